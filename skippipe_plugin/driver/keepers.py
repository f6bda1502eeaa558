"""Which workers keep a copy of what the driver itself holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Placed(Protocol):
    """A worker, and where it is."""

    rank: int
    host: str
    """The address of its host."""
    is_local: bool
    """Whether that is the driver's."""


_P = TypeVar("_P", bound=Placed)


def keepers_among(workers: Sequence[_P]) -> list[_P]:
    """Choose two workers, or all where there are fewer.

    They are on two other hosts than the driver's where there are so many, since a host may be lost with all that is on
    it; where hosts do not tell, they are those of the first and the last rank.

    Example:
        >>> from types import SimpleNamespace as Worker
        >>> ranks = [Worker(rank=1, host="a", is_local=True), Worker(rank=2, host="b", is_local=False)]
        >>> [worker.rank for worker in keepers_among([*ranks, Worker(rank=3, host="a", is_local=True)])]
        [2, 3]
    """
    if not workers:
        return []
    first = min(workers, key=lambda worker: (worker.is_local, worker.rank))
    others = [worker for worker in workers if worker is not first]
    last = max(others, default=None, key=lambda worker: (not worker.is_local, worker.host != first.host, worker.rank))
    return [first] if last is None else [first, last]
