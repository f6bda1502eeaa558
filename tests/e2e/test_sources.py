"""A user's own source of workers: it is asked for them, is told which are given back, and tells which are gone."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest
from lightning.pytorch import Trainer

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.sources import Door
from skippipe_plugin.strategies import NetworkConfig, stop_workers

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import assert_same_losses, assert_same_run, train
from .test_recovery import At, await_spare


class Subprocesses:
    """A source as a user writes one: it knows Python, the interface, and nothing else of ours."""

    def __init__(self) -> None:
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.told: dict[str, str] = {}
        self.calls: list[str] = []
        self.numbers = itertools.count()

    def itself(self) -> "Subprocesses":
        return self

    def open(self) -> tuple[str, int]:
        self.calls.append("open")
        return "127.0.0.1", 0

    def give(self, count: int, door: Door) -> Sequence[str]:
        self.calls.append(f"give {count}")
        tickets = [f"seat {next(self.numbers)}" for _ in range(count)]
        for ticket in tickets:
            command = door.command(ticket, python=sys.executable)
            self.processes[ticket] = subprocess.Popen(command, env=os.environ | door.environment())
        return tickets

    def gone(self) -> Mapping[str, str]:
        ended = {ticket: each.returncode for ticket, each in self.processes.items() if each.poll() is not None}
        return {ticket: f"it ended with {status}" for ticket, status in ended.items()} | self.told

    def take_back(self, ticket: str) -> None:
        self.calls.append(f"take back {ticket}")
        self.told.pop(ticket, None)
        process = self.processes.pop(ticket)
        process.kill()
        process.wait()

    def close(self) -> None:
        self.calls.append("close")
        for process in self.processes.values():  # one that has not joined yet was told nothing
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def source() -> Iterator[Subprocesses]:
    stop_workers()
    yield Subprocesses()
    stop_workers()


def make() -> LanguageModel:
    return LanguageModel(Transformer())


def test_workers_of_a_users_source_compute_what_one_process_does(source: Subprocesses) -> None:
    data = loader(tokens(24))
    found = train(make, data, 3, {"network": NetworkConfig(workers=source.itself)})
    assert_same_run(found, train(make, data, 1))
    assert source.calls == ["open", "give 2"]
    stop_workers()
    assert source.calls[-1] == "close"
    assert not [each for each in source.processes.values() if each.poll() is None]


@pytest.mark.parametrize("who", [pytest.param("its end", marks=pytest.mark.slow), "its source"])
def test_a_worker_that_is_gone_is_replaced_by_the_source(who: str, source: Subprocesses) -> None:
    """Whoever notices first; a source that says so is believed though the process lives on and answers."""

    def lose(trainer: Trainer) -> None:
        await_spare(trainer)
        ticket = next(t for t, each in source.processes.items() if each.pid == trainer.strategy.worker_pids[1])
        if who == "its end":
            os.kill(source.processes[ticket].pid, signal.SIGKILL)
        else:
            source.told[ticket] = "its machine was taken away"
            time.sleep(1.5)
        lost.append(ticket)

    lost: list[str] = []
    recovery, data = StageRecovery(heartbeat_s=60), loader(tokens(24))
    settings = {"network": NetworkConfig(workers=source.itself), "replicas": 2}
    found = train(make, data, 3, settings, callbacks=[recovery, At("on_train_batch_start", 2, lose)])
    assert_same_losses(found.losses, train(make, data, 1).losses, rtol=1e-4)
    (event,) = recovery.events
    assert event.source == "replica"
    assert ("its machine was taken away" in str(event)) == (who == "its source")
    assert [call for call in source.calls if call.startswith("take")] == [f"take back {lost[0]}"]
    assert source.calls.count("give 1") >= 1


class Hopeless(Subprocesses):
    """Has no machine for anybody."""

    def give(self, count: int, door: Door) -> Sequence[str]:
        tickets = [f"seat {next(self.numbers)}" for _ in range(count)]
        self.told |= dict.fromkeys(tickets, "no machine is free")
        return tickets

    def take_back(self, ticket: str) -> None:
        self.told.pop(ticket)


def test_workers_that_end_before_they_join_are_an_error_that_tells_how() -> None:
    with pytest.raises(SkipPipeError, match=r"ended before they joined: .*seat \d+ \(no machine is free\)"):
        train(make, loader(tokens(24)), 3, {"network": NetworkConfig(workers=Hopeless().itself)})
    stop_workers()


def test_a_source_that_gives_a_ticket_twice_is_an_error() -> None:
    hopeless = Hopeless()
    hopeless.numbers = itertools.cycle([0])  # type: ignore[assignment]
    with pytest.raises(SkipPipeError, match="gave a ticket twice"):
        train(make, loader(tokens(24)), 3, {"network": NetworkConfig(workers=hopeless.itself)})
    stop_workers()


@pytest.mark.parametrize("by_environment", [False, True])
def test_ranks_that_nobody_has_started_need_a_secret(by_environment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_environment:
        monkeypatch.setenv("SKIPPIPE_WORKERS", "launched")
    network = NetworkConfig() if by_environment else NetworkConfig(workers="launched")
    stop_workers()
    with pytest.raises(ValueError, match=r"workers='launched' leaves workers to join by hand, who must know a secret"):
        train(make, loader(tokens(24)), 3, {"network": network})
