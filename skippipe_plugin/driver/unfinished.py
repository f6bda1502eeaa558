"""A step's function that has called the blocks once more, though its step knew of one call: it goes on in another way.

The driver's part of the first call is as in one process: the function has its result, whose gradient is what its blocks
go back from. So they may run once more then, like those of any call that others have followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine.errors import SkipPipeError
from .capture import own_gradients
from .capture.cutting import Cut
from .capture.proxies import BlockProxies
from .capture.stack_call import StackCall
from .capture.suspend import Returned, StepThread, Suspended
from .capture.token import check_available


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A call whose blocks have run, and with whose result the driver's code has computed already."""

    call: StackCall
    versions: Sequence[int]
    """Of what the blocks got in it, when they got it."""
    leaf: Tensor
    """Gets the gradient of what they returned."""

    def can_run_again(self) -> bool:
        """Whether its blocks may run once more for that gradient."""
        call = self.call
        return not (call.hooks or call.exported or call.caches) and self.leaf.requires_grad


@dataclass(frozen=True, slots=True)
class Parked:
    """A step that waits for the gradients of what its functions have returned, and may be given up meanwhile."""

    calls: Sequence[GivenUp]
    """Of its functions, in their order."""
    values: Sequence[Any]  # Any: whatever the user's code returns
    """What they have returned."""
    sources: Sequence[Tensor]
    """What the blocks of one of them got."""
    seed: int
    """Of the blocks' randomness."""
    sizes: Sequence[int] = ()
    """By function: its number of samples; empty for one function on the whole batch."""
    cut: tuple[int, Cut] | None = None
    """How many samples a call on the whole batch had, and how it was cut, if it was."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is left of a step that was given up because its function has called the blocks once more."""

    thread: StepThread
    """Where the function waits."""
    first: GivenUp
    """The call of which the step knew."""
    cut: tuple[int, Cut] | None
    """How many samples it had, and how it was cut, if it was."""
    seed: int
    """Of the blocks' randomness in it."""
    request: StackCall
    """The call under which it waits."""

    def finish(self, answer: Callable[[StackCall], Tensor], proxies: BlockProxies) -> Any:  # Any: what it returns
        """Let the function go on to its end, its calls answered; return what it returns."""
        request, calls = self.request, [(self.first.leaf, self.first.call.sources)]
        while True:
            result = answer(request)
            calls.append((result, request.sources))
            with own_gradients.Checked(*calls):
                outcome = self.thread.resume(result)
            request.recording.check()
            if isinstance(outcome, Returned):
                proxies.check_complete(self.thread)
                check_available(outcome.value)
                return outcome.value
            assert isinstance(outcome, Suspended)
            request = outcome.request


class CalledTwice(SkipPipeError):
    """A training step has called the blocks once more.

    Args:
        message: Says so.
        unfinished: Its function, where that may go on.
    """

    def __init__(self, message: str, unfinished: Unfinished | None = None) -> None:
        super().__init__(message)
        self.unfinished = unfinished
