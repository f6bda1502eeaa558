"""Steps that run as in one process, once on the whole batch: only their calls of the blocks go through the pipeline.

So do those of modules that go back and step their optimizers themselves (``automatic_optimization = False``), and those
that call the blocks several times before their loss is there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule

from ..driver.block_states import NotedCall
from ..driver.capture.growing import sample_counts
from ..driver.unfinished import CalledTwice, Unfinished
from ..engine.control.values import States
from ..engine.errors import SkipPipeError, none_swallowed
from ..model.backwards import Backwards
from ..model.open_calls import OpenCalls
from ..model.open_step import OpenStep
from ..model.spread import SpreadModel
from ..model.wanted import FirstRuns, with_outputs
from .checks import check_several_calls
from .whole_step import WholeStep

log = logging.getLogger(__name__)

Begun = tuple[Unfinished, NotedCall]
"""What is left of a step, and its first call."""

_SEVERAL_CALLS: Final = (
    "training_step calls the blocks %d times or more before it goes back. It runs once, on the whole batch, of which "
    "only what enters the blocks is cut; all forwards come before the loss, and those of all calls but the last run "
    "once more on the way back"
)
_GONE_BACK: Final = (
    "training_step uses what single blocks return, for the first time after it has gone back once already: the step "
    "cannot begin again then. Use it before the first backward, too (with a weight of 0)"
)


def opened_steps(
    spread: SpreadModel, module: LightningModule, device: torch.device, num_calls: int = 0, *, repeats: bool
) -> OpenSteps:
    """Return what runs such steps, open; see :class:`OpenSteps`.

    With ``num_calls``, since they call the blocks so often, which is said.

    Raises:
        SkipPipeError: With the settings of ``spread`` they may not.
    """
    if num_calls:
        check_several_calls(spread.settings)
        log.warning(_SEVERAL_CALLS, num_calls)
    steps = OpenSteps(spread, module, device, repeats=repeats)
    steps.open()
    return steps


def noted_call(spread: SpreadModel, *, is_first: bool, is_cut: bool) -> tuple[NotedCall, States | None]:
    """Return the first call of a step that may turn out to make others, and what it wants of the blocks' states.

    Args:
        spread: The blocks.
        is_first: Whether the step is the first of its kind.
        is_cut: Whether it runs once for each microbatch.
    """
    pipeline = spread.pipeline
    states = pipeline.states
    if is_cut and not is_first:
        return NotedCall(0), None  # it does not go on
    call = states.call()
    is_noted = is_first or (spread.settings.drivers == 1 and (states.has_buffers or pipeline.proxies.book.keeps))
    return call, call.next() if is_noted else None


def begun_step(called: CalledTwice, noted: NotedCall, undo: Callable[[], None] | None) -> Begun | None:
    """Return a step that has called the blocks once more, such that it goes on; None where it begins again.

    Args:
        called: What it has raised.
        noted: Its first call.
        undo: Takes back what it has changed, if that was noted.
    """
    if called.unfinished is not None:
        return called.unfinished, noted
    if undo is None:
        raise called
    undo()
    return None


class OpenSteps:
    """Runs them, from :meth:`open` to :meth:`close`.

    Args:
        spread: The module's blocks.
        module: The user's.
        device: The driver's.
        repeats: Whether interrupted calls of the blocks are repeated.
    """

    def __init__(self, spread: SpreadModel, module: LightningModule, device: torch.device, *, repeats: bool) -> None:
        self._spread = spread
        self._ends_itself = not module.automatic_optimization
        self._step = OpenStep(spread, module, device)
        self._calls = OpenCalls(spread, self._step, repeats=repeats)
        self._firsts = FirstRuns()
        self._backwards = Backwards(self._step.begin_backward, self._step.complete, self._step.fail)

    def open(self) -> None:
        """Begin to follow the backwards of this process."""
        self._backwards.follow()
        self._spread.pipeline.may_wait(self._step.make_room)

    def close(self) -> None:
        """Give up what waits, and follow no more."""
        self._spread.pipeline.may_wait(None)
        self._step.close()
        self._backwards.leave()

    def run(self, whole: WholeStep, seed: int, num_steps: int, begun: Begun | None = None) -> Any:
        """Run a step, and return what it returns; the first one begins again where it asks for what blocks return.

        Args:
            whole: The step.
            seed: Of the randomness in the blocks.
            num_steps: The optimizer steps so far.
            begun: What is left of it, where it has begun without knowing how often it calls the blocks.
        """
        if begun is not None:
            return self._go_on(*begun, whole, seed, num_steps)
        pipeline = self._spread.pipeline
        num_merged, undo = pipeline.gradients.num_merged, self._firsts.undo("step", whole.note_state)
        last = pipeline.states.last

        def undo_forwards() -> None:
            if pipeline.gradients.num_merged != num_merged:
                raise SkipPipeError(_GONE_BACK)
            assert undo is not None
            undo()
            pipeline.states.last = last

        run = functools.partial(self._run, whole, seed, num_steps)
        return with_outputs(self._spread, run, None if undo is None else undo_forwards, is_noted=True)

    def _go_on(self, part: Unfinished, noted: NotedCall, whole: WholeStep, seed: int, num_steps: int) -> Any:
        pipeline = self._spread.pipeline
        pipeline.heal()
        self._calls.begin(sample_counts(whole.batch), seed, num_steps)
        self._calls.take_over(part, noted)
        try:
            with none_swallowed(), whole.logging(), pipeline.open_to(self._calls):
                return part.finish(self._calls, pipeline.proxies)
        except BaseException:
            part.thread.close()
            self._step.close()
            raise

    def _run(self, whole: WholeStep, seed: int, num_steps: int) -> Any:
        self._step.settle("the next training_step")
        self._calls.begin(sample_counts(whole.batch), seed, num_steps)
        try:
            with none_swallowed(), self._spread.pipeline.open_to(self._calls):
                result = whole.call()
            if self._ends_itself:
                self._step.settle("the end of training_step")
        except BaseException:
            self._step.close()
            raise
        return result

    def settle(self, why: str) -> None:
        """Let no call wait for its backward any longer: what comes needs the workers, and ``why`` says what that is."""
        self._step.settle(why)
