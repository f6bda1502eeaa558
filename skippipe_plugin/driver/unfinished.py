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
from .capture.cutting import Cut
from .capture.proxies import BlockProxies
from .capture.stack_call import StackCall
from .capture.suspend import Returned, StepThread, Suspended
from .capture.token import check_available


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What is left of a step that was given up because its function has called the blocks once more."""

    thread: StepThread
    """Where the function waits."""
    first: StackCall
    """The call of which the step knew."""
    versions: Sequence[int]
    """Of what the blocks got in it, when they got it."""
    cut: tuple[int, Cut] | None
    """How many samples it had, and how it was cut, if it was."""
    leaf: Tensor
    """Gets the gradient of what they returned."""
    seed: int
    """Of their randomness."""
    request: StackCall
    """The call under which it waits."""

    def finish(self, answer: Callable[[StackCall], Tensor], proxies: BlockProxies) -> Any:  # Any: what it returns
        """Let the function go on to its end, its calls answered; return what it returns."""
        request = self.request
        while True:
            outcome = self.thread.resume(answer(request))
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
