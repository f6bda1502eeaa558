"""How far the clocks of other hosts are from ours.

``time.perf_counter`` starts anywhere, on each host. What a worker measured is laid beside what the driver measured by
the offset between the two clocks. The fastest of a few questions bounds it best: the answer was read somewhere
between asking and hearing it, most likely in the middle.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Final

from ..engine.control.answers import ClockReads
from ..engine.control.commands import AskClock
from .links import Link, Links

_ROUNDS: Final = 5
_FRESH_S: Final = 60.0
"""Clocks drift apart by some millionths: after a minute that is as much as a short round trip."""


def clock_offset_s(
    ask: Callable[[], float], *, clock: Callable[[], float] = time.perf_counter, rounds: int = _ROUNDS
) -> float:
    """Return how far another clock is ahead of ours; 0 where the difference could be all delay.

    The second half is exact where it matters: processes of one host share the clock, and are not told apart by noise.

    >>> now = iter([10.0, 10.5, 20.0, 20.1])
    >>> clock_offset_s(iter([110.25, 120.05]).__next__, clock=now.__next__, rounds=2)
    100.0

    Args:
        ask: Returns the other clock's reading.
        clock: Ours.
        rounds: How often to ask.
    """
    trips = [_round_trip(ask, clock) for _ in range(rounds)]
    delay_s, offset_s = min(trips)
    return 0.0 if abs(offset_s) <= delay_s / 2 else offset_s


def _round_trip(ask: Callable[[], float], clock: Callable[[], float]) -> tuple[float, float]:
    asked = clock()
    reading = ask()
    heard = clock()
    return heard - asked, reading - (asked + heard) / 2


class WorkerClocks:
    """The offsets of all workers' clocks, asked for when they are needed and no longer fresh."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._offsets_s: dict[int, float] = {}
        self._read_at = 0.0

    def read(self) -> None:
        """Ask every worker for its clock unless that was done a moment ago; they must be idle."""
        now = time.perf_counter()
        if self._offsets_s.keys() != {link.rank for link in self._links} or now - self._read_at > _FRESH_S:
            self._offsets_s = {link.rank: clock_offset_s(functools.partial(_ask, link)) for link in self._links}
            self._read_at = now

    def offset_s(self, rank: int) -> float:
        """Return how far that rank's clock is ahead of the driver's, as of the last :meth:`read`."""
        return self._offsets_s.get(rank, 0.0)

    def forget(self) -> None:
        """Ask anew at the next :meth:`read`: other processes may have taken over the ranks."""
        self._offsets_s = {}


def _ask(link: Link) -> float:
    return link.ask(AskClock(), ClockReads).now
