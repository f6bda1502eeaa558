"""What replaces workers that are lost, as a pipeline sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from .recovery.heartbeat import Heartbeat

_T = TypeVar("_T")


class Keeper(Protocol):
    """Replaces workers that are lost; :mod:`.recovery.stage_keeper` has the one there is."""

    heartbeat: Heartbeat
    """Asks the workers whether they live."""
    gave_up: bool
    """Whether it has given up: too many were lost."""

    def attempt(self, action: Callable[[], _T], rewind: Callable[[], None], *, whole: bool) -> _T:
        """Run ``action``; after a loss restore what it needs, ``rewind``, and run it again."""

    def settle_in(self, action: Callable[[], None]) -> None:
        """Run ``action``, which brings every worker what it holds, again when a worker was lost under it."""

    def close(self) -> None:
        """Stop watching the workers."""


def settle_in(keeper: Keeper | None, action: Callable[[], None]) -> None:
    """Run ``action`` while the driver has all that workers hold; again when one was lost under it and replaced."""
    if keeper is None:
        action()
    else:
        keeper.settle_in(action)
