"""What the accumulated gradients were computed from, so that those of a lost stage can be computed again.

A stage holds the gradients of every batch since they were zeroed. They go with its worker; a replica has them too, but
there may be none. So each batch is kept here until the optimizer has stepped, and the batches of the window under way
are run once more for the stages that were rebuilt. Only these add the gradients then, with the scale that the batch
had: everybody else has added them already, so each sample counts once everywhere. What such a run changes in the user's
objects is taken back.

What cannot be computed again (gradients that user code has written, or that an optimizer step has used and nobody has
zeroed) is refused where it would be used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from ..engine.call import Ambient
from ..engine.control.answers import Unscaled
from ..engine.control.codec import Control
from ..engine.control.commands import Clip, Merge, Unscale
from ..engine.errors import SkipPipeError
from ..schedule import Schedule
from .links import Links
from .steps import StepTask
from .whole_step import WholeTask

log = logging.getLogger(__name__)

_T = TypeVar("_T")
WRITTEN: Final = "they were written by user code (parameter.grad = ...)"
STEPPED: Final = "an optimizer step has used them, and they were not zeroed since"


@dataclass(frozen=True, slots=True)
class Batch:
    """A training step that was run."""

    task: StepTask | WholeTask
    rewind: Callable[[], None]
    """Brings the user's objects back to what they were when it began."""
    schedule: Schedule
    """What it ran by, around the workers that were missing."""
    ambient: Ambient
    generation: int


@dataclass(frozen=True, slots=True)
class _Added:
    """The gradients of a batch were added."""

    batch: Batch
    scale: float
    stage_scales: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class _Clipped:
    """What was accumulated until then was clipped."""

    scale: float | None
    value: float | None


@dataclass(frozen=True, slots=True)
class _Unscaled:
    """What was accumulated until then was multiplied by a loss scaler."""

    inverse: float
    overflowed: bool


class Host(Protocol):
    """The pipeline, as far as it is needed here."""

    links: Links

    @property
    def generation(self) -> int:
        """The number of the present one."""

    def repeat(self, batch: Batch, *, keep: bool) -> None:
        """Run a batch once more, in the present generation; ``keep`` its new gradients everywhere, to be added."""

    def surviving(self, action: Callable[[], _T]) -> _T:
        """Run ``action``, again when a worker was lost under it."""

    def heal(self) -> None:
        """Have idle workers."""


class Accumulation:
    """The batches whose gradients are accumulated, and who lacks them.

    Args:
        host: Runs batches again; None until there is somebody who replaces lost workers, and then nothing is kept.
    """

    def __init__(self, host: Host | None = None) -> None:
        self.host = host
        self._new: Batch | None = None
        """The last batch, until its gradients are added."""
        self._window: list[_Added | _Clipped | _Unscaled] = []
        self._fixed = ""
        """Why what is accumulated cannot be computed again, if so."""
        self.repeating = False
        """Whether a batch is run once more for some: what it counts in the blocks' buffers was counted before."""
        self._lacking: set[int] = set()
        """The ranks whose stages were rebuilt, without what they had accumulated."""

    # ------------------------------------------------------- what happens to gradients

    def ran(self, batch: Batch) -> None:
        """Note a training step, whose gradients are new."""
        self._new = batch

    def added(self, scale: float, stage_scales: Sequence[tuple[int, float]]) -> None:
        """Note that the new gradients were added to the accumulated ones."""
        batch, self._new = self._new, None
        if batch is not None:
            self._window.append(_Added(batch, scale, stage_scales))

    def clipped(self, scale: float | None, value: float | None) -> None:
        """Note that what is accumulated so far was clipped."""
        if self._window and (scale is not None or value is not None):
            self._window.append(_Clipped(scale, value))

    def unscaled(self, inverse: float, *, overflowed: bool) -> None:
        """Note that what is accumulated so far was multiplied by a loss scaler, and what that has found."""
        if self._window:
            self._window.append(_Unscaled(inverse, overflowed))

    def written(self) -> None:
        """Note that user code has written accumulated gradients."""
        if self.host is not None:
            self._fixed = WRITTEN

    def zeroed(self) -> None:
        """Note that nothing is accumulated any more."""
        self._window.clear()
        self._lacking.clear()
        self._fixed = ""

    def stepped(self, *, kept: bool) -> None:
        """Note an optimizer step, after which workers may have ``kept`` the gradients."""
        self.zeroed()
        if self.host is not None:
            self._new = None
            self._fixed = STEPPED if kept else ""

    # ----------------------------------------------------------------- losses

    @property
    def num_batches(self) -> int:
        """How many batches a stage that is rebuilt now lacks, and will be given."""
        return 0 if self._fixed else sum(isinstance(each, _Added) for each in self._window)

    def lack(self, rank: int) -> None:
        """Note that the stages of ``rank`` were rebuilt without what they had accumulated."""
        if self._window or self._fixed:
            self._lacking.add(rank)

    def lacks(self, rank: int) -> bool:
        """Whether the stages of ``rank`` lack what they had accumulated."""
        return rank in self._lacking

    def copied(self, rank: int, source: int) -> None:
        """Note that the worker at ``rank`` has got what the one at ``source`` has accumulated."""
        self._lacking.discard(rank)
        if source in self._lacking:
            self._lacking.add(rank)

    def settle(self) -> None:
        """In an attempt: compute again what stages lack, if that can be done."""
        if self._lacking and not self._fixed:
            self._repeat()

    def require(self) -> None:
        """See to it that the accumulated gradients are whole, because they are used now.

        Raises:
            SkipPipeError: Some were lost and cannot be computed again.
        """
        if not self._lacking:
            return
        if self._fixed:
            raise SkipPipeError(
                f"the gradients that worker rank {', '.join(map(str, sorted(self._lacking)))} had accumulated are lost "
                f"with it and cannot be computed again: {self._fixed}. Zero gradients after each optimizer step and "
                "change them in on_before_optimizer_step only (in a loop of your own: right before optimizer.step()), "
                "or give the stages a replica (replicas=2), which holds the same; go on from the last checkpoint"
            )
        self._survive(self._repeat)

    def renew(self) -> None:
        """Before the new gradients are added: compute them again if a loss came after the step, which drops them."""
        if self._lacking and self._fixed:
            self.require()
        batch, host = self._new, self.host
        if batch is None or host is None or batch.generation == host.generation:
            return
        log.warning("a worker was lost before the gradients of the last batch were added; the batch is repeated")
        self._survive(lambda: host.repeat(batch, keep=True))

    def _survive(self, action: Callable[[], None]) -> None:
        host = self.host
        assert host is not None, "nothing was kept"

        def attempt() -> None:
            host.heal()
            action()

        host.surviving(attempt)

    def _repeat(self) -> None:
        """Run the batches of the window once more, for those who lack their gradients."""
        host = self.host
        assert host is not None, "nothing was kept"
        lacking = [rank for rank in sorted(self._lacking) if rank in host.links]
        log.warning(
            "batches since the last optimizer step that are repeated for the gradients of worker rank %s: %d",
            ", ".join(map(str, lacking)),
            self.num_batches,
        )
        self._tell(lacking, Clip(None, None, "drop"))  # a repetition may be repeated
        for each in self._window:
            if isinstance(each, _Clipped):
                self._tell(lacking, Clip(each.scale, each.value, ""))
                continue
            if isinstance(each, _Unscaled):
                self._unscale(lacking, each)
                continue
            self.repeating = True
            try:
                host.repeat(each.batch, keep=False)
            finally:
                self.repeating = False
            self._tell(lacking, Merge(each.scale, "", each.stage_scales, None))
        self._lacking.clear()

    def _unscale(self, ranks: Sequence[int], how: _Unscaled) -> None:
        assert self.host is not None
        for rank in ranks:
            answer = self.host.links[rank].ask(Unscale(0, how.inverse, None), Unscaled)
            if answer.overflowed and not how.overflowed:
                raise SkipPipeError(
                    f"the gradients of the stages that worker rank {rank} has taken over are not finite, which the "
                    "loss scaler would have had to know before the worker that held them was lost; go on from the "
                    "last checkpoint"
                )

    def _tell(self, ranks: Sequence[int], command: Control) -> None:
        assert self.host is not None
        for rank in ranks:
            self.host.links[rank].send(command)
