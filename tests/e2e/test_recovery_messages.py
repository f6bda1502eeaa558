"""What a driver and its workers say to each other in a recovery, and nothing else."""

import os
import signal
import time
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.links import Link
from skippipe_plugin.driver.recovery.policy import WhileMissing
from skippipe_plugin.engine.control.answers import ClockReads, Failed, State
from skippipe_plugin.engine.control.codec import Control, Received
from skippipe_plugin.engine.control.commands import Arrange, AskClock, Calls, Configure, Get, Step
from skippipe_plugin.engine.control.line import Said
from skippipe_plugin.engine.control.presence import Beat
from skippipe_plugin.job import job

from .test_recovery import run

LOST = 2
"""The rank whose worker is killed, of three."""
UNSTEADY = (Calls, AskClock, ClockReads, Beat)
"""Further calls are as many messages as the driver was quick; clocks are asked when steps are recorded, signs of life
where somebody was slow."""


def told(body: Control) -> str:
    """A message, with what matters of it."""
    kind = type(body).__name__
    match body:
        case Configure():
            return f"{kind} members {' '.join(map(str, body.members))}"
        case Arrange():
            plan = " and plan" if body.parts.has_plan else ""
            return f"{kind} stages {[stage for stage, _, _ in body.stages]}, keep {body.keep}, with parts{plan}"
        case Get():
            return f"{kind} {body.what} of {body.blocks}"
        case State():
            return f"{kind} of stages {[stage for stage, _ in body.stages]}"
        case Step():
            return f"{kind} {'training' if body.opening.training else 'evaluation'}"
        case Failed():
            return f"{kind}{' as others did' if body.aborted else ''}"
    return kind


class Log(Callback):
    """Kills a worker before the third batch, and notes what is said until the end of that batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: dict[int, list[str]] = {}
        self._is_open = False
        tell, take = Link.tell, Link._take

        def telling(link: Link, body: Control | Said, **how: Any) -> int:
            self._note(link, "> ", body.body if isinstance(body, Said) else body)
            return tell(link, body, **how)

        def taking(link: Link, received: Received) -> None:
            self._note(link, "< ", received.body)
            take(link, received)

        monkeypatch.setattr(Link, "tell", telling)
        monkeypatch.setattr(Link, "_take", taking)

    def _note(self, link: Link, direction: str, body: Control) -> None:
        if self._is_open and link.rank > 0 and not isinstance(body, UNSTEADY):
            self.said.setdefault(link.rank, []).append(direction + told(body))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            link = trainer.strategy._running().links[LOST]
            os.kill(trainer.strategy.worker_pids[LOST], signal.SIGKILL)
            deadline_s = time.monotonic() + 30
            while not link.gone and time.monotonic() < deadline_s:
                time.sleep(0.01)
            self._is_open = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._is_open = False


END = ["> Step training", "> Merge", "> StepOptimizer"]
REBUILT = {
    1: [
        "> Step training",  # the worker's end is noticed when its turn comes
        "> Abort",
        "> Configure members 0 1 2 3",
        "> Get standing of None",
        "> Get weights of [0, 1]",
        *END,
        "< Failed as others did",
        "< Ready",
        "< State of stages [1]",
        "< State of stages [1]",
        "< Done",
    ],
    2: [
        "> Abort",  # of the lost one; then its spare
        "> Configure members 0 1 2 3",
        "> Arrange stages [2], keep [], with parts and plan",
        "> LetGo",
        *END,
        "< Ready",
        "< Ready",
        "< Done",
    ],
    3: [
        "> Abort",
        "> Configure members 0 1 2 3",
        "> Get standing of None",
        "> Get weights of [4, 5]",
        *END,
        "< Ready",
        "< State of stages [3]",
        "< State of stages [3]",
        "< Done",
    ],
}
AROUND = {
    1: ["> Step training", "> Abort", "> Configure members 0 1 3", *END, "< Failed as others did", "< Ready", "< Done"],
    2: ["> Abort"],
    3: ["> Abort", "> Configure members 0 1 3", *END, "< Ready", "< Done"],
}


@pytest.mark.parametrize(
    ("spares", "while_missing", "expected"),
    [(1, "wait", REBUILT), pytest.param(0, "skip", AROUND, marks=pytest.mark.slow)],
    ids=["spare", "around"],
)
def test_recovery_word_for_word(
    spares: int, while_missing: WhileMissing, expected: dict[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rank: what it is told, and then what it says; which of these comes first differs from run to run."""
    job.stop_workers()  # what another test has left idle would be a spare
    log = Log(monkeypatch)
    run(log, recovery=StageRecovery(spares=spares, while_missing=while_missing), max_steps=4)
    assert {rank: sorted(said, key=lambda each: each[0] == "<") for rank, said in log.said.items()} == expected
