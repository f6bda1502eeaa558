"""Signs of life: finds workers that are paused, cut off or hung, whose connection never breaks by itself."""

from __future__ import annotations

import threading
from typing import Final

from .links import Links

_QUESTIONS: Final = 5
"""How often it is looked whether a worker has answered, within the time in which it must."""


class Heartbeat:
    """Asks every worker of ``links`` in turn, in a thread that :meth:`close` joins.

    Args:
        links: The workers, whoever they are at the moment.
        limit_s: Seconds without an answer after which a worker counts as lost.
    """

    def __init__(self, links: Links, limit_s: float) -> None:
        self._links = links
        self._limit_s = limit_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(self._limit_s / _QUESTIONS):
            for link in list(self._links):
                link.beat(_QUESTIONS)
