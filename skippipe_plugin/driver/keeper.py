"""What replaces workers that are lost, as a pipeline sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Keeper(Protocol):
    """Replaces workers that are lost; :class:`skippipe_plugin.driver.recovery.StageKeeper` is the one there is."""

    def attempt(self, action: Callable[[], _T], rewind: Callable[[], None], *, whole: bool) -> _T:
        """Run ``action``; after a loss restore what it needs, ``rewind``, and run it again."""

    def close(self) -> None:
        """Stop watching the workers."""
