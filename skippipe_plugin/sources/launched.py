"""Workers that come by themselves: the ranks of a launcher, and whoever joins by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .interface import Door
from .local import HERE


class LaunchedSource:
    """Starts nobody and ends nobody: workers join when somebody else has started them."""

    def open(self) -> tuple[str, int]:
        """Return this host's own address; workers of others need ``NetworkConfig(host=...)``."""
        return HERE, 0

    def give(self, count: int, door: Door) -> Sequence[str]:
        """Leave it to those who start workers."""
        return ()

    def gone(self) -> Mapping[str, str]:
        """Return nobody: the end of a worker's channel says that it is gone."""
        return {}

    def take_back(self, ticket: str) -> None:
        """Leave it to its own end: it hears that it was given up."""

    def close(self) -> None:
        """Leave them: they have been told that the job is over."""
