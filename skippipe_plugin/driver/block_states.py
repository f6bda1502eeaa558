"""What blocks keep from one forward to the next, seen from a driver: which call begins with what.

Every call that may run once more has a number. The workers note what they keep under it when it begins, and find that
again when the call runs once more for its gradients, or from its beginning.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from ..engine.block_states import BlockStates
from ..engine.control.values import Opening, States, Writes
from ..engine.stage import Stage


@dataclass(slots=True, eq=False, weakref_slot=True)
class NotedCall:
    """A call of the blocks that may run once more; it lives as long as that may be."""

    number: int
    has_run: bool = False

    def next(self) -> States:
        """Return what its next run wants: the first one notes what it finds, and the others begin with it."""
        has_run, self.has_run = self.has_run, True
        return States(start=self.number) if has_run else States(note=self.number)


class StateControl:
    """Numbers calls, and keeps the states of the stages on this driver."""

    def __init__(self) -> None:
        self.last = 0
        """The number of the last call; who lets calls begin again sets it back to what it was."""
        self.has_buffers = False
        """Whether any block has one."""
        self._alive: weakref.WeakSet[NotedCall] = weakref.WeakSet()
        self._hosted = BlockStates()
        self._may_repeat = False
        self._counts = False
        self._is_evaluated = False
        """Whether the last step was none of training, and is over."""
        self._num_evaluations = self._evaluation = 0
        """How many there were, and the number of the one whose first step is to come."""

    def own(self, blocks: Sequence[nn.Module], hosted: Mapping[int, Stage], *, may_repeat: bool) -> None:
        """Take charge of blocks, of which some are on this driver; lost steps are repeated if ``may_repeat``."""
        self.has_buffers = any(True for block in blocks for _ in block.buffers())
        self._hosted, self._may_repeat = BlockStates(hosted), may_repeat

    def call(self) -> NotedCall:
        """Return a new call."""
        self.last += 1
        call = NotedCall(self.last)
        self._alive.add(call)
        return call

    def new_evaluation(self) -> int:
        """Number an evaluation that may have to begin again; 0 where nobody repeats what is lost."""
        self._num_evaluations += self._may_repeat
        return self._num_evaluations

    def evaluate(self, number: int) -> None:
        """Begin an evaluation, or begin it again: the step that comes is its first one."""
        self._evaluation = number

    def begin(
        self, opening: Opening, states: States | None, weights: Callable[[], Collection[tuple[int, str]]]
    ) -> Opening:
        """Begin a step; return its announcement with what it wants.

        Args:
            opening: The announcement.
            states: What it wants.
            weights: Returns the parameters that forwards write.
        """
        self._is_evaluated = False
        evaluation, self._evaluation = self._evaluation, 0
        if states is None and evaluation and not opening.training:
            states = States(evaluation=evaluation)
        if states is not None:
            oldest = min((call.number for call in self._alive), default=states.note)
            states = replace(states, oldest=oldest, weights=sorted(weights()))
            opening = replace(opening, states=states)
        self._hosted.begin(states, repeats=opening.repeats, may_repeat=self._may_repeat and opening.training)
        return opening

    def end(self, *, training: bool) -> Writes:
        """End a step that has come to its end everywhere; return what forwards here have written."""
        self._is_evaluated = not training
        return self._hosted.end()

    @contextmanager
    def counted(self, counts: bool = True) -> Iterator[None]:
        """Let a step whose forwards are done count in the blocks, though it is given up."""
        before, self._counts = self._counts, self._counts or counts
        try:
            yield
        finally:
            self._counts = before

    def give_up(self, *, in_step: bool) -> bool:
        """Give up what is under way; return whether what the last step has left in the blocks stays."""
        counts = self._counts or (self._is_evaluated and not in_step)
        self._hosted.settle(counts=counts)
        return counts
