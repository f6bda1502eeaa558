"""Calls of the blocks that code makes itself, outside of any step, and back-propagates through when it wants to.

The code runs once, on the whole batch, as in one process; only its call of the blocks is cut into microbatches. Where,
is tried on the blocks: nobody's code can be run again to ask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..driver.capture.arguments import SideInputs
from ..driver.capture.entered import EnteredStack
from ..driver.capture.proxies import StackCall
from ..driver.capture.suspend import suspend_here
from ..driver.whole_step import WholeTask
from ..engine.call import block_seed
from .entrance import Entrance
from .open_step import OpenStep
from .spread import SpreadModel


class OpenCalls:
    """Answers them; an :class:`OpenStep` waits for their backward.

    Args:
        spread: The blocks.
        step: Where a call with gradients waits.
        repeats: Whether interrupted steps are repeated.
    """

    def __init__(self, spread: SpreadModel, step: OpenStep, *, repeats: bool) -> None:
        self._spread = spread
        self._step = step
        self._repeats = repeats
        self._counts: Sequence[int] = ()
        self._seed = self._num_steps = self._num_calls = 0

    def begin(self, counts: Sequence[int], seed: int, num_steps: int) -> None:
        """Expect the calls for one batch.

        Args:
            counts: How many samples it may have.
            seed: Of the randomness in the blocks.
            num_steps: The optimizer steps so far.
        """
        self._counts, self._seed, self._num_steps, self._num_calls = counts, seed, num_steps, 0

    def __call__(self, call: StackCall) -> Tensor:
        """Run the blocks, and return what they return."""
        if not self._goes_back(call):
            self._step.settle("a call of the blocks through which no gradient goes back")
            task = self._task(call, training=False)
            with torch.set_grad_enabled(call.ambient.grad):
                result: Tensor = self._spread.evaluate(task)[0]
            return result
        self._step.begin()
        entrance = Entrance()
        run = functools.partial(self._run, _entered(call, entrance), entrance)
        stack = f"the stack of {self._spread.pipeline.proxies.names[0]}"
        return self._step.hand_out(entrance, run, lambda outputs: outputs[0], what=stack, draws_on=True)  # type: ignore[no-any-return]

    def _goes_back(self, call: StackCall) -> bool:
        trains = any(any(mode.requires_grad) for mode in call.modes)
        return call.ambient.grad and (trains or any(t.requires_grad for t in (call.hidden, *call.side_inputs)))

    def _run(self, call: StackCall, entrance: Entrance, outside: Callable[..., None]) -> None:
        self._spread.train(self._task(call, entrance, outside, training=True), self._num_steps)

    def _task(
        self,
        call: StackCall,
        entrance: Entrance | None = None,
        outside: Callable[..., None] | None = None,
        *,
        training: bool,
    ) -> WholeTask:
        self._num_calls += 1
        undo = _nothing if entrance is None else entrance.undone_with(_nothing)
        return WholeTask(
            function=lambda: suspend_here(call),
            loss_of=lambda _: None,
            seed=block_seed(self._seed, self._num_calls),
            training=training,
            name="call",
            counts=self._counts,
            note_state=lambda: undo,
            repeats=self._repeats,
            outside=outside,
        )


def _entered(call: StackCall, entrance: Entrance) -> StackCall:
    """Return the same call, as the beginning of a graph of its own."""
    (hidden, *sides), _ = entrance.enter((call.hidden, *call.side_inputs), {})
    return dataclasses.replace(call, entered=EnteredStack(hidden), beside=SideInputs(sides))


def _nothing() -> None:
    """Nothing to undo."""
