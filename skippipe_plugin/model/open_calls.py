"""Calls of the blocks that code makes itself, outside of any step, and back-propagates through when it wants to.

The code runs once, on the whole batch, as in one process; only its call of the blocks is cut into microbatches. Where,
is tried on the blocks: nobody's code can be run again to ask.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..driver.block_states import NotedCall
from ..driver.capture.arguments import SideInputs
from ..driver.capture.entered import EnteredStack
from ..driver.capture.hooks import Seen
from ..driver.capture.stack_call import StackCall
from ..driver.capture.suspend import suspend_here
from ..driver.unfinished import Unfinished
from ..driver.whole_step import WholeTask
from ..engine.arguments import versions
from ..engine.call import block_seed
from ..engine.errors import SkipPipeError
from .entrance import Entrance
from .open_step import OpenStep
from .spread import SpreadModel

_HOOKS: Final = (
    "a forward hook of yours watches {block} or modules in it, in a step that goes back itself or calls the blocks "
    "several times: what it sees could be part of a loss, and of which call that is cannot be told. Remove the hook "
    "before the step (and register it for validation), return what it collects from the block, or let the step call "
    "the blocks once (in a LightningModule: under automatic optimization)"
)
_CHANGED: Final = (
    "a tensor that the blocks got (shape {shape}) was changed in place after they were called. In a step that goes "
    "back itself or calls the blocks several times they may run once more when their gradients are there, and would "
    "get the changed values; make a new tensor instead (x = x + 1 in place of x += 1)"
)


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
        self._seed = self._num_steps = self._number = 0
        self._batch = object()
        self._num_handles = 0
        """How many hooks torch had registered, of whatever kind, when the batch began."""
        self._followed: set[int] = set()
        """The numbers of calls in a step that others with gradients have followed before their backward."""

    def begin(self, counts: Sequence[int], seed: int, num_steps: int, batch: object = None) -> None:
        """Expect the calls for one batch.

        Args:
            counts: How many samples it may have.
            seed: Of the randomness in the blocks.
            num_steps: The optimizer steps so far.
            batch: Stands for it, where other steps belong to it, too: all take the same paths.
        """
        self._counts, self._seed, self._num_steps, self._number = counts, seed, num_steps, 0
        self._batch = object() if batch is None else batch
        self._num_handles = RemovableHandle.next_id

    def expect(self, counts: Sequence[int]) -> None:
        """Expect further calls for the same batch, of other inputs, which may have so many samples."""
        self._counts = counts

    def take_over(self, part: Unfinished, noted: NotedCall) -> None:
        """Take over the first call of a step that did not know of others."""
        call = part.first.call
        entrance = Entrance(of_model=False, is_hooked=call.entered.is_hooked)
        check = unchanged([call.hidden, *call.side_inputs], part.first.versions)
        run = functools.partial(
            self._run,
            entered(call, entrance),
            entrance,
            part.seed,
            self._batch,
            check,
            noted,
            counts=(),
            cut=part.cut,
        )
        self._spread.take_same_paths(self._batch)
        self._num_handles = RemovableHandle.next_id
        self._step.take_over(entrance, run, part.first.leaf)
        self._number = 1
        self._followed.add(1)

    def __call__(self, call: StackCall) -> Tensor:
        """Run the blocks, and return what they return; what else of them is used is in the call then."""
        result, *call.values = self._outputs(call)
        return result

    def _outputs(self, call: StackCall) -> Sequence[Tensor]:
        """Run the blocks; return their result, and what else of what they return is used."""
        self._number += 1
        seed = block_seed(self._seed, self._number)
        noted = self._spread.pipeline.states.call()
        if not call.goes_back:
            self._step.make_room("a call of the blocks through which no gradient goes back")
            with torch.set_grad_enabled(call.ambient.grad):
                return self._evaluated(call, seed, noted)
        if self._step.begin():
            self._followed.add(self._number - 1)
        if call.hooks:
            raise SkipPipeError(_HOOKS.format(block=self._spread.pipeline.proxies.names[min(call.hooks)]))
        is_hooked = call.entered.is_hooked or RemovableHandle.next_id != self._num_handles
        entrance = Entrance(of_model=False, is_hooked=is_hooked)
        given = [call.hidden, *call.side_inputs]
        run = functools.partial(
            self._run, entered(call, entrance), entrance, seed, self._batch, unchanged(given), noted
        )
        if self._number in self._followed:
            with torch.no_grad():
                task = self._task(_without_gradients(call), seed, training=False, states=noted.next())
                [outputs] = self._spread.rehearse(task, self._num_steps, self._batch)
            return _as_seen(self._step.hand_out_later(entrance, run, outputs))
        result: Sequence[Tensor] = self._step.hand_out(
            entrance,
            run,
            lambda outputs: outputs[0],
            what=f"the stack of {self._spread.pipeline.proxies.names[0]}",
            draws_on=True,
            repeats=True,
        )
        return _as_seen(result)

    def _evaluated(self, call: StackCall, seed: int, noted: NotedCall) -> Sequence[Tensor]:
        task = self._task(call, seed, training=False, states=noted.next())
        result: Sequence[Tensor] = self._spread.evaluate(task)[0]
        return result

    def _run(
        self,
        call: StackCall,
        entrance: Entrance,
        seed: int,
        batch: object,
        check: Callable[[], None],
        noted: NotedCall,
        outside: Callable[..., None],
        **options: Any,
    ) -> None:
        check()
        undo, states = entrance.undone_with(_nothing), noted.next()
        task = self._task(call, seed, training=True, note_state=lambda: undo, outside=outside, states=states, **options)
        self._spread.train(task, self._num_steps, batch)

    def _task(self, call: StackCall, seed: int, *, training: bool, **options: Any) -> WholeTask:
        return WholeTask(
            function=lambda: (suspend_here(call), *call.values),
            loss_of=lambda _: None,
            seed=seed,
            training=training,
            name="call",
            repeats=self._repeats,
            **{"counts": self._counts, **options},
        )


def _as_seen(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs of which all but the result may not be asked for gradients: only a part of those comes here."""
    result, *others = outputs
    return [result, *(each.as_subclass(Seen) if each.requires_grad else each for each in others)]


def entered(call: StackCall, entrance: Entrance) -> StackCall:
    """Return the same call, as the beginning of a graph of its own."""
    (hidden, *sides), _ = entrance.enter((call.hidden, *call.side_inputs), {})
    return dataclasses.replace(call, entered=EnteredStack(hidden), beside=SideInputs(sides))


def _without_gradients(call: StackCall) -> StackCall:
    """Return the same call, of which only the result is wanted."""
    sides = SideInputs([side.detach() for side in call.side_inputs])
    ambient = dataclasses.replace(call.ambient, grad=False)
    return dataclasses.replace(call, entered=EnteredStack(call.hidden.detach()), beside=sides, ambient=ambient)


def unchanged(given: Sequence[Tensor], noted: Sequence[int] = ()) -> Callable[[], None]:
    """Return what raises when one of these was changed in place since, or since its version was ``noted``."""
    noted = noted or versions(given)

    def check() -> None:
        for tensor, before, now in zip(given, noted, versions(given), strict=True):
            if now != before:
                raise SkipPipeError(_CHANGED.format(shape=tuple(tensor.shape)))

    return check


def _nothing() -> None:
    """Nothing to undo."""
