"""Faults beside a worker that dies: a full disk, a worker that sleeps and wakes up."""

import functools
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.transport import Transport
from skippipe_plugin.model import spread
from skippipe_plugin.testing import At as Moment
from skippipe_plugin.testing import Cut, FillDisk, Injector, Phase, Reset, Stop
from skippipe_plugin.worker import WorkerProcesses
from tests.grids import slow

from .support import Run, assert_same_losses, assert_same_weights
from .test_recovery import STEPS, At, assert_counted, kill, run


def test_a_full_disk_ends_the_run_as_ever_and_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    def save(folder: str, *happenings: Callback, ckpt_path: str | None = None) -> Run:
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        recovery = StageRecovery(spares=0)
        return run(saver, *happenings, recovery=recovery, enable_checkpointing=True, ckpt_path=ckpt_path)[0]

    save("undisturbed")
    with pytest.raises(OSError, match="File too large"), Injector(FillDisk(Moment(Phase.STEPPING, nth=3))):
        save("full")
    expected, found = (tmp_path / folder / "step=2.ckpt" for folder in ("undisturbed", "full"))
    states = [torch.load(path, weights_only=False)["state_dict"] for path in (found, expected)]
    assert_same_weights(*states)
    result = save("resumed", ckpt_path=str(found))  # by the same workers, in the same process
    assert (result.trainer.global_step, len(result.losses)) == (STEPS, STEPS - 2)


@pytest.mark.slow
def test_a_paused_worker_that_wakes_up_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another host, where nobody can end it: it is replaced, wakes up with its old stage, and has no say."""
    monkeypatch.setattr(WorkerProcesses, "kill", lambda *_: None)
    paused: list[psutil.Process] = []

    def pause(trainer: Trainer) -> None:
        paused.append(psutil.Process(trainer.strategy.worker_pids[3]))
        kill(3, how=signal.SIGSTOP)(trainer)

    def wake(trainer: Trainer) -> None:
        assert recovery.events, "it was not replaced"
        paused[0].resume()

    def is_gone(trainer: Trainer) -> None:
        paused[0].wait(30)

    recovery = StageRecovery(heartbeat_s=2.0)
    happenings = [At("on_train_batch_start", 3, pause), At("on_train_batch_start", 5, wake)]
    happenings += [At("on_train_batch_end", 7, is_gone)]
    result, _ = run(*happenings, recovery=recovery, replicas=2)
    expected, _ = run(replicas=2)
    assert_counted(result)
    assert [(event.source, event.how_lost) for event in recovery.events] == [("replica", "it gave no sign of life")]
    assert_same_losses(result.losses, expected.losses)
    assert_same_weights(result.weights, expected.weights)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment", [slow(Moment(Phase.TRAINING, step=2)), Moment(Phase.TRAINING, step=2, action="0B1")])
def test_a_paused_worker_is_an_error_that_names_it_where_nobody_is_replaced(
    moment: Moment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its links are whole, since its host answers for it: a run without StageRecovery would wait for ever."""
    monkeypatch.setattr(spread, "_SILENT_S", 3.0)
    with (
        Injector(Stop(moment, 2)) as injector,
        pytest.raises(SkipPipeError, match=r"worker rank 2 \(stage 2\).* gave no sign of life"),
    ):
        run()
    assert all(each.done for each in injector.report)
    assert "worker rank 2 (stage 2) has given no sign of life" in caplog.text


class Forgetful:
    """A way to send of a transport that forgets one message of the driver, as gloo may where a connection breaks."""

    def __init__(self, nth: int) -> None:
        self.count, self.nth, self.usual = 0, nth, Transport._post

    def __call__(self, transport: Transport, *message: Any) -> None:
        self.count += 1
        if self.count != self.nth:
            self.usual(transport, *message)
        else:
            destination, tag, _ = message
            transport._traffic.send(destination, tag)

    def __get__(self, transport: Any, _: Any = None) -> Any:
        return functools.partial(self, transport)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("nth", [slow(9), 14])  # a hidden state, a gradient
def test_a_message_that_is_lost_while_all_live(
    nth: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody notices by himself: all wait for each other, and nothing is on its way."""
    expected, _ = run()
    monkeypatch.setattr(Transport, "_post", forgetful := Forgetful(nth))
    result, recovery = run(recovery=StageRecovery(spares=0, heartbeat_s=1.0))
    assert forgetful.count > nth
    assert not recovery.events
    assert len(re.findall(r"nothing comes from the driver to worker rank \d .* was a message lost\?", caplog.text)) == 1
    assert_same_losses(result.losses, expected.losses)
    assert_same_weights(result.weights, expected.weights)
    assert_counted(result)


@pytest.mark.timeout(120)
def test_a_message_that_is_lost_is_an_error_where_nobody_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "_SILENT_S", 1.0)
    monkeypatch.setattr(Transport, "_post", Forgetful(9))
    with pytest.raises(SkipPipeError, match=r"nothing comes from the driver to worker rank 1 \(stage 1\)"):
        run()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("between", [(1, 2), (0, 3)], ids=["workers", "driver"])
def test_a_cut_between_the_living_is_found_within_seconds(
    between: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is told of it, and both ends answer their driver: no byte moves, though one waits for what was sent."""
    expected, _ = run()
    with Injector(Cut(Moment(Phase.TRAINING, step=3, action="0F2"), between, connections="data")) as injector:
        result, recovery = run(recovery=StageRecovery(spares=0, heartbeat_s=4.0))
        took_s = time.monotonic() - injector._armed_s - injector.report[0].seconds
    assert injector.num_done == 1
    assert took_s < 10, "the system would have found it after 15 s"
    assert not recovery.events
    first, second = ("the driver" if rank == 0 else rf"worker rank {rank} \(stage {rank}\)" for rank in between)
    assert re.search(rf"nothing comes from ({first} to {second}|{second} to {first}), though both live", caplog.text)
    assert_same_losses(result.losses, expected.losses)
    assert_same_weights(result.weights, expected.weights)
    assert_counted(result)


@pytest.mark.timeout(120)
def test_two_workers_that_do_not_reach_each_other_are_parted(caplog: pytest.LogCaptureFixture) -> None:
    """Their connection breaks whenever it was made anew: one of them is replaced, and the run goes on."""
    resets = [Reset(Moment(Phase.TRAINING, step=3, action="0F0", nth=nth), (1, 2)) for nth in (1, 2, 3)]
    recovery = StageRecovery(spares=1, lr_factor=1.0)
    with Injector(*resets) as injector:
        result, _ = run(recovery=recovery)
    assert injector.num_done == 3, injector.report
    (event,) = recovery.events
    assert re.fullmatch(r"its connections with rank [12] broke again and again", event.how_lost)
    assert event.rank in (1, 2)
    assert_counted(result)
