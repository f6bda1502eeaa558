"""Workers that joined a supervised job by hand: they outlive its driver, and the next driver waits for them.

Nobody else knows of them: the supervisor has not started them, and they may be on other machines. So each driver keeps
a list of those that are there in the job's store, which the supervisor hosts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..driver.links import Link
from ..engine.c10d import TCPStore
from ..engine.control.keeping import Drop
from ..engine.control.presence import Outlive


class RollCall:
    """The list of one driver, and the one that the driver before it has left.

    Args:
        store: The job's, by a connection of its own: it is used in the thread that lets workers in.
        host: The store's, as workers reach it.
        key: Where in the store workers find the driver's address.
    """

    def __init__(self, store: TCPStore, host: str, key: str) -> None:
        self._store = store
        self._where = Outlive(host, store.port, key)
        self._list = f"{key}/by hand"
        self._noted: list[str] = json.loads(store.get(self._list)) if store.check([self._list]) else []
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
        """Note who is there; called again and again."""
        names = sorted(link.name for link in links if link.name and not link.gone)
        if self.is_over and names != self._noted:
            self._store.set(self._list, json.dumps(names))
            self._noted = names


def drop(link: Link) -> None:
    """Let a worker forget what it holds: others hold it, further on in training."""
    link.tell(Drop())
