"""Workers are lost where nobody is at work yet, or as they take over: the run goes on, or ends and says why."""

import os
import signal
import time
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver import recovery as recovery_module
from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.driver.optimizer import RemoteOptimizer
from skippipe_plugin.driver.pipeline import Pipeline
from skippipe_plugin.driver.stages import StageSender
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import stop_workers

from .support import Run, assert_same_losses, assert_same_weights
from .test_recovery import At, assert_counted, await_spare, kill, run


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    return run()[0]


def end(link: Link) -> None:
    """Kill a worker, and wait until that is known."""
    assert link.pid is not None
    os.kill(link.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not link.gone:
        assert time.monotonic() < deadline, "the death was not noticed"
        time.sleep(0.01)


class Once:
    """Wraps a method so that the worker of a rank dies before, or after, it runs for the first time."""

    def __init__(self, rank: int, *, after: bool) -> None:
        self.ranks, self.after = [rank], after

    def __call__(self, original: Any, links: Any) -> Any:
        def wrapped(it: Any, *args: Any) -> Any:
            if self.after:
                result = original(it, *args)
            if self.ranks:
                end(links(it)[self.ranks.pop()])
            return result if self.after else original(it, *args)

        return wrapped


@pytest.mark.parametrize(
    ("moment", "after", "rank"),
    [
        ("blocks", True, 2),
        pytest.param("blocks", False, 1, marks=pytest.mark.slow),
        pytest.param("meeting", False, 3, marks=pytest.mark.slow),
        pytest.param("meeting", True, 2, marks=pytest.mark.slow),
        pytest.param("optimizer", False, 2, marks=pytest.mark.slow),
    ],
)
def test_a_worker_dies_before_the_first_step(
    moment: str, after: bool, rank: int, undisturbed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver has everything until the blocks are handed out; the optimizer comes after that."""
    once = Once(rank, after=after)
    if moment == "blocks":
        original = StageSender.send_all
        monkeypatch.setattr(StageSender, "send_all", lambda it, links: once(original, lambda _: links)(it, links))
    elif moment == "meeting":
        monkeypatch.setattr(Pipeline, "form", once(Pipeline.form, lambda pipeline: pipeline.links))
    else:
        monkeypatch.setattr(
            RemoteOptimizer, "_describe", once(RemoteOptimizer._describe, lambda it: it._pipeline.links)
        )
    found, recovery = run(recovery=StageRecovery(rule="mean", lr_factor=1.0))
    assert not once.ranks
    assert_counted(found)
    (event,) = recovery.events
    assert event.stages == (rank,)
    if moment == "optimizer":
        assert event.source == "neighbours"
        return
    assert event.source == "driver"
    assert "handed over once more by the driver, exact" in str(event)
    assert_same_losses(found.losses, undisturbed.losses)
    assert_same_weights(found.weights, undisturbed.weights)


@pytest.mark.slow
def test_two_die_one_after_the_other_while_blocks_are_handed_out(
    undisturbed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, victims = StageSender.send_all, [2, 2, 3]

    def send_all(sender: StageSender, links: Links) -> None:
        original(sender, links)
        if victims:
            end(links[victims.pop()])

    monkeypatch.setattr(StageSender, "send_all", send_all)
    monkeypatch.setattr(recovery_module, "_MAX_JOIN_DEATHS", 3)
    found, recovery = run(recovery=StageRecovery(spares=2))
    assert not victims
    assert {event.source for event in recovery.events} == {"driver"}
    assert_same_weights(found.weights, undisturbed.weights)


@pytest.mark.slow
def test_replacements_that_die_as_they_take_over_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the first nor never, and the story is told; nobody tries once more to bring the model back."""
    original, taken = recovery_module.carry_out, []

    def carry_out(pipeline: Pipeline, orders: Any) -> None:
        taken.extend(orders)
        for rank in orders:
            end(pipeline.links[rank])
        original(pipeline, orders)

    monkeypatch.setattr(recovery_module, "carry_out", carry_out)
    with pytest.raises(
        SkipPipeError, match=r"2 replacements of worker rank 2 \(stage 2\) died before they had taken over"
    ):
        run(At("on_train_batch_start", 3, kill(2)), recovery=StageRecovery(spares=2))
    assert taken == [2, 2]


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_ends_the_run() -> None:
    """Each one takes over and dies in the step."""

    class Cursed(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
            if index == 3:
                pipeline = trainer.strategy._running().pipeline
                forth_and_back = pipeline._forth_and_back

                def cursed(*args: Any) -> None:
                    end(pipeline.links[2])
                    forth_and_back(*args)

                pipeline._forth_and_back = cursed

    with pytest.raises(
        SkipPipeError, match=r"6 workers of worker rank 2 .* were lost one after the other, and nothing was"
    ):
        run(Cursed(), recovery=StageRecovery(spares=1))


@pytest.mark.slow
@pytest.mark.parametrize("given_up", [False, True])
def test_paused_spares_are_not_taken(given_up: bool) -> None:
    """Two are paused at the same moment as a worker dies, or long before."""
    stop_workers()

    def pause(trainer: Trainer) -> None:
        await_spare(trainer, 2)
        for pid in trainer.strategy.spare_pids:
            os.kill(pid, signal.SIGSTOP)
            paused.append(pid)
        if given_up:
            deadline = time.monotonic() + 30
            while set(trainer.strategy.spare_pids).intersection(paused):
                assert time.monotonic() < deadline, "nobody has asked the spares for signs of life"
                time.sleep(0.1)
        kill(2)(trainer)

    paused: list[int] = []
    recovery = StageRecovery(spares=2, heartbeat_s=2.0)
    found, _ = run(At("on_train_batch_start", 4, pause), recovery=recovery)
    assert_counted(found)
    assert len(recovery.events) == 1
