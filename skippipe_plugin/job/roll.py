"""Workers that joined a supervised job by hand: they outlive its driver, and the next driver waits for them.

Nobody else knows of them: the supervisor has not started them, and they may be on other machines. So each driver keeps
a list of those that are there in the job's store, which the supervisor hosts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..driver.links import Link
from ..engine.control.keeping import Drop
from ..engine.control.presence import Outlive
from ..engine.job_store import Address, JobStore, Members


class RollCall:
    """The list of one driver, and the one that the driver before it has left.

    Args:
        store: The job's, by a connection of its own: it is used in the thread that lets workers in.
        key: Where in the store workers find the driver's address.
    """

    def __init__(self, store: JobStore, key: str) -> None:
        self._store = store
        self._key = key
        self._noted = store.members(key)
        self._where = self._said = self._told([store.address])
        self.awaited = tuple(self._noted.names)
        """The names of those that were there when the last driver was lost."""
        self.is_over = False
        """Whether all have come that were waited for: what others hold is of no use any more."""

    def greet(self, link: Link) -> None:
        """Note a worker that has joined before it takes part, and tell it how it finds the next driver."""
        if link.name:
            if self.is_over:
                self._note({*self._noted.names, link.name})
                self._where = self._told(self._where.stores)
            link.tell(self._where)
        if self.is_over:
            drop(link)

    def look(self, links: Sequence[Link]) -> None:
        """Note who is there, and tell them of each other and of new stores; called again and again.

        Whoever stands by looks into the store now and then only: what it has not seen it hears of those that are told.
        """
        present = [link for link in links if link.name and not link.gone]
        if self.is_over:
            self._note({link.name for link in present})
        self._where = self._told([self._store.address, *self._store.standbys()])
        if self._where != self._said:
            self._said = self._where
            for link in present:
                link.tell(self._where)

    def _note(self, names: Collection[str]) -> None:
        if set(names) != set(self._noted.names):
            self._noted = Members(self._noted.number + 1, sorted(names))
            self._store.note_members(self._key, self._noted)

    def _told(self, stores: Sequence[Address]) -> Outlive:
        return Outlive(stores, self._key, self._noted.number, self._noted.names)


def drop(link: Link) -> None:
    """Let a worker forget what it holds: others hold it, further on in training."""
    link.tell(Drop())
