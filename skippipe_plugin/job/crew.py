"""The workers that a source has given to this driver: how many are on their way, who is gone."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Protocol

from ..driver.links import Link
from ..engine.errors import SkipPipeError
from ..sources import Door, WorkerSource

_SETTLED_S: Final = 0.5
"""How long after the source a worker's own channel may still tell more: what has failed in it, for instance."""


class Crew(Protocol):
    """Worker processes by their tickets, whoever keeps them: this driver's source, or its supervisor."""

    def start(self, count: int, door: Door) -> None:
        """Have ``count`` more workers come; return at once."""

    def running(self) -> list[str]:
        """Return those that are there or on their way."""

    def num_starting(self, joined: Collection[str]) -> int:
        """Return how many are on their way, not among those that ``joined``."""

    def ended_early(self, joined: Collection[str]) -> Mapping[str, str]:
        """Return those that ended without having joined, and how."""

    def kill(self, ticket: str) -> None:
        """End one of them at once; no harm if it is nobody of these."""

    def reap(self) -> None:
        """Forget those that ended."""

    def stop(self) -> None:
        """Take all back."""


class SourceCrew:
    """The crew of a driver that keeps its source itself."""

    def __init__(self, source: WorkerSource) -> None:
        self._source = source
        self._tickets: list[str] = []

    def start(self, count: int, door: Door) -> None:
        """Have ``count`` more workers come; return at once."""
        tickets = self._source.give(count, door)
        if len({*tickets, *self._tickets}) < len(tickets) + len(self._tickets):
            raise SkipPipeError(
                f"the source of workers gave a ticket twice: {[*tickets]} after {self._tickets}; each worker needs one "
                "of its own"
            )
        self._tickets += tickets

    def running(self) -> list[str]:
        """Return those that are there or on their way."""
        gone = self._source.gone()
        return [ticket for ticket in self._tickets if ticket not in gone]

    def num_starting(self, joined: Collection[str]) -> int:
        """Return how many are on their way."""
        return sum(ticket not in joined for ticket in self.running())

    def ended_early(self, joined: Collection[str]) -> Mapping[str, str]:
        """Return those that ended without having joined, and how."""
        known = set(self._tickets)
        return {each: how for each, how in self._source.gone().items() if each in known and each not in joined}

    def kill(self, ticket: str) -> None:
        """Give one back to the source."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._source.take_back(ticket)

    def reap(self) -> None:
        """Give those back that ended."""
        for ticket in set(self._tickets) - set(self.running()):
            self.kill(ticket)

    def stop(self) -> None:
        """Take all back."""
        self._tickets.clear()
        self._source.close()


class SourceWatch:
    """Tells the driver of workers that their source knows to be gone and whose link is whole still.

    A machine that was cut off sends nothing, not even the end of a connection; its scheduler may know before we do.
    """

    def __init__(self, source: WorkerSource) -> None:
        self._source = source
        self._since_s: dict[str, float] = {}

    def greet(self, link: Link) -> None:
        """See :class:`skippipe_plugin.driver.pool.Doorkeeper`."""

    def look(self, links: Sequence[Link]) -> None:
        """Give those up that are gone."""
        gone, now_s = self._source.gone(), time.monotonic()
        self._since_s = {ticket: self._since_s.get(ticket, now_s) for ticket in gone}
        for link in links:
            since_s = self._since_s.get(link.ticket)
            if since_s is not None and now_s - since_s > _SETTLED_S and not link.gone:
                link.give_up(gone[link.ticket])
