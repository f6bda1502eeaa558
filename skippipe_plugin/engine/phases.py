"""What a driver is doing, for who wants to know: the named phases of a run, and an observer of them.

Nobody listens in ordinary runs, and then a phase costs one look at an empty tuple. Who does listen
(:mod:`skippipe_plugin.testing`) is called in the driver's thread as a phase is reached, before what it is about to do.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Phase(enum.StrEnum):
    """What a driver is about to do."""

    STARTING = "starting"
    """To start a worker process."""
    MEETING = "meeting"
    """To take workers for a pipeline, waiting for those that are still to join."""
    FORMING = "forming"
    """To connect all ranks with each other."""
    HANDING_OVER = "handing over"
    """To send a stage to a worker that holds it."""
    PROBING = "probing"
    """To ask what a block does to its input."""
    PLANNING = "planning"
    """To choose the paths of a training step."""
    TRAINING = "training"
    """To run a training step, or an action of its own in it."""
    MERGING = "merging"
    """To add a step's gradients to the accumulated ones."""
    STEPPING = "stepping"
    """To let the optimizers step."""
    VALIDATING = "validating"
    """To run a step without gradients, or an action of its own in it."""
    SAVING = "saving"
    """To fetch weights or the optimizer's state, as for a checkpoint."""
    TAKING_OVER = "taking over"
    """To give a worker what it holds from now on: after a loss, or because blocks move."""
    MOVING = "moving"
    """To spread the blocks over another number of stages."""
    ENDING = "ending"
    """To bring the weights back and end a pipeline."""
    BETWEEN = "between"
    """To do nothing: a pipeline has ended, its workers are idle, and another one may come."""
    EXPORTING = "exporting"
    """To write a smaller checkpoint."""


@dataclass(frozen=True, slots=True)
class Moment:
    """A phase that was reached."""

    phase: Phase
    step: int = -1
    """In training steps: how many optimizer steps were taken before."""
    action: str = ""
    """In steps: the action that the driver is about to run, such as ``0F2``; empty when the step begins."""

    def __str__(self) -> str:
        return f"{self.phase}{f' step {self.step}' * (self.step >= 0)}{f' {self.action}' * bool(self.action)}"


Watcher = Callable[[Moment], None]
watchers: tuple[Watcher, ...] = ()
"""Who listens; replaced as a whole by :func:`watching`."""
_step = Moment(Phase.TRAINING)
"""The step that is under way."""


def reach(phase: Phase, step: int = -1) -> None:
    """Say that a phase is reached."""
    global _step
    if not watchers:
        return
    moment = Moment(phase, step)
    if phase in (Phase.TRAINING, Phase.VALIDATING):
        _step = moment
    _tell(moment)


def act(action: object) -> None:
    """Say that an action of the step under way is reached; to be called when there are :data:`watchers` only."""
    _tell(Moment(_step.phase, _step.step, str(action)))


def _tell(moment: Moment) -> None:
    for watcher in watchers:
        watcher(moment)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Let ``watcher`` know of all phases of this process; what it raises is raised where the phase is reached."""
    global watchers
    watchers = (*watchers, watcher)
    try:
        yield
    finally:
        watchers = tuple(each for each in watchers if each is not watcher)
