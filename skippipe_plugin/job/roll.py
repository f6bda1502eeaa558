"""Workers that joined a supervised job by hand: they outlive its driver, and the next driver waits for them.

Nobody else knows of them: the supervisor has not started them, and they may be on other machines. So each driver keeps
a list of those that are there in the job's store, which the supervisor hosts.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..driver.links import Link
from ..engine.control.keeping import Drop
from ..engine.control.presence import Outlive
from ..engine.job_store import JobStore


class RollCall:
    """The list of one driver, and the one that the driver before it has left.

    Args:
        store: The job's, by a connection of its own: it is used in the thread that lets workers in.
        key: Where in the store workers find the driver's address.
    """

    def __init__(self, store: JobStore, key: str) -> None:
        self._store = store
        self._key = key
        self._where = Outlive([store.address], key)
        self._noted = store.members(key)
        self.awaited = tuple(self._noted)
        """The names of those that were there when the last driver was lost."""
        self.is_over = False
        """Whether all have come that were waited for: what others hold is of no use any more."""

    def greet(self, link: Link) -> None:
        """Tell a worker that has joined how it finds the next driver."""
        if link.name:
            link.tell(self._where)
        if self.is_over:
            drop(link)

    def look(self, links: Sequence[Link]) -> None:
        """Note who is there, and tell them of new stores; called again and again."""
        present = [link for link in links if link.name and not link.gone]
        names = sorted(link.name for link in present)
        if self.is_over and names != self._noted:
            self._store.note_members(self._key, names)
            self._noted = names
        stores = [self._store.address, *self._store.standbys()]
        if stores != self._where.stores:
            self._where = Outlive(stores, self._key)
            for link in present:
                link.tell(self._where)


def drop(link: Link) -> None:
    """Let a worker forget what it holds: others hold it, further on in training."""
    link.tell(Drop())
