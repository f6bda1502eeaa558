"""In which order a worker takes the messages of several drivers.

The first driver commands, and may be ahead of the others, who have still to ask for what is before the command: so a
command waits until all of them have come to it, which each says with a ``pass``; who asks after that waits for it.
A driver that has announced its next step has nothing left to ask or to command.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Final

from ..engine.control.codec import Received
from ..engine.control.commands import (
    Abort,
    AskNorm,
    Clip,
    Configure,
    Get,
    Merge,
    Pass,
    StepOptimizer,
    SwitchOptimizer,
    Unscale,
)
from ..engine.control.presence import Exit, Release

_COMMANDS: Final = (Merge, AskNorm, Clip, Unscale, StepOptimizer, SwitchOptimizer)
"""What every driver comes to, and what changes or measures what the others can ask for."""
_AT_ONCE: Final = (Configure, Release, Exit, Abort)


class DriversOrder:
    """Holds messages back: the first driver's while another one is behind, another's questions while the first is.

    Args:
        announced: Returns which drivers have announced the next step.
    """

    def __init__(self, announced: Callable[[], Collection[int]]) -> None:
        self.num_drivers = 1
        self._announced = announced
        self._held: deque[Received] = deque()
        self._early: deque[tuple[int, Received]] = deque()
        self._passes: Counter[int] = Counter()
        self._num_done = 0

    def restart(self, num_drivers: int) -> None:
        """Begin anew, with nothing held back."""
        self.num_drivers = num_drivers
        self._held.clear()
        self._early.clear()
        self.start_step()

    def start_step(self) -> None:
        """Begin a step: all drivers have come to it."""
        self._passes.clear()
        self._num_done = 0

    def admit(self, source: int, message: Received) -> bool:
        """Whether ``message`` is to be obeyed now; otherwise it is held back, or has been."""
        if isinstance(message.body, Pass):
            self._passes[source] += 1
            return False
        if source == 0 and not isinstance(message.body, _AT_ONCE) and (self._held or self._must_wait(message)):
            self._held.append(message)
            return False
        if source > 0 and isinstance(message.body, Get) and self._is_early(source):
            self._early.append((source, message))
            return False
        self._note(source, message)
        return True

    def ready(self) -> tuple[int, Received] | None:
        """Return a message that has been held back for long enough, and who sent it."""
        if self._early and not self._is_early(self._early[0][0]):
            return self._early.popleft()
        if not self._held or self._must_wait(self._held[0]):
            return None
        message = self._held.popleft()
        self._note(0, message)
        return 0, message

    @property
    def is_ready(self) -> bool:
        """Whether a message of the first driver has been held back for long enough."""
        return bool(self._held) and not self._must_wait(self._held[0])

    def _note(self, source: int, message: Received) -> None:
        if source == 0 and isinstance(message.body, _COMMANDS):
            self._num_done += 1

    def _is_early(self, source: int) -> bool:
        return self._passes[source] > self._num_done and 0 not in self._announced()

    def _must_wait(self, message: Received) -> bool:
        if self.num_drivers == 1 or not isinstance(message.body, _COMMANDS):
            return False
        announced = self._announced()
        return any(self._passes[d] <= self._num_done and d not in announced for d in range(1, self.num_drivers))
