"""Signs of life: finds workers that are paused, cut off or hung, whose connection never breaks by itself.

And messages that were lost while all live: then all wait for each other, and nothing is on its way.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from typing import Final

from ...engine.waiting import nothing_is_under_way
from ..links import ALL_SILENT_S, Link, Links

log = logging.getLogger(__name__)

_QUESTIONS: Final = 5
"""How often it is looked whether a worker has answered, within the time in which it must."""
_TOLD_AFTER: Final = 3
"""After so many of them the user is told who is waited for."""
_STALLED_AFTER: Final = 3
"""After so many of them, in each of which all waited for what they waited for before, a message counts as lost."""


class Stall:
    """Sees that nothing goes on though all live."""

    def __init__(self) -> None:
        self._turns: tuple[int, ...] = ()
        self._times = 0

    def lasts(self, links: Links, times: int) -> bool:
        """Look at who waits for what; return whether that was the same for so many looks in a row."""
        turns = (links.generation, links.waiting.turn, *(link.waits() for link in links))
        is_still = all(turns[1:]) and len(turns) > 2 and turns == self._turns and nothing_is_under_way()
        self._turns, self._times = turns, self._times + 1 if is_still else 0
        return self._times == times


class Heartbeat:
    """Asks every worker of ``links`` in turn, in a thread that :meth:`close` joins.

    Args:
        links: The workers, whoever they are at the moment.
        limit_s: Seconds without an answer after which a worker counts as lost.
        idle: Returns the workers that nobody uses, which are asked too: one that is gone is no spare.
        fence: Ends what is left of an idle worker that was given up.
        is_only_driver: Whether no other driver may be what all wait for.
    """

    def __init__(
        self,
        links: Links,
        limit_s: float,
        idle: Callable[[], Iterable[Link]] = tuple,
        fence: Callable[[Link], None] = lambda _: None,
        *,
        is_only_driver: bool = True,
    ) -> None:
        self._links = links
        self._idle, self._fence = idle, fence
        self._is_only_driver = is_only_driver
        self._limit_s = limit_s
        self._since_s = limit_s * _TOLD_AFTER / _QUESTIONS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        told, stall = False, Stall()
        while not self._over.wait(self._limit_s / _QUESTIONS):
            links = list(self._links)
            if self._is_only_driver and stall.lasts(self._links, _STALLED_AFTER):
                log.warning(
                    "the driver and its workers wait for each other, and nothing is on its way: a message is lost"
                )
                self._links.report_stall(self._links.generation)
            all_silent = len(links) > 1 and all(link.is_silent for link in links)
            if all_silent and not told:
                log.warning("no worker answers: waiting for %g s for the driver's own link", ALL_SILENT_S)
            told = all_silent
            for link in links:
                if link.num_unanswered == _TOLD_AFTER and not all_silent:
                    log.warning("%s has given no sign of life for some %g s of %g", link, self._since_s, self._limit_s)
                link.beat(_QUESTIONS + all_silent * math.ceil(ALL_SILENT_S / self._limit_s * _QUESTIONS))
            for link in self._idle():
                if link.beat(_QUESTIONS):
                    log.warning("an idle worker is lost: %s", link.how_lost)
                    try:
                        self._fence(link)
                    except Exception as error:  # the source may be the user's; the others are still to be asked
                        log.warning("what is left of it could not be ended: %s: %s", type(error).__name__, error)
