"""Signs of life: finds workers that are paused, cut off or hung, whose connection never breaks by itself.

And links that are cut, or have lost a message, while all live: one end waits for what the other one has sent, and no
byte moves (:mod:`.dead_links`); or all wait for each other, and nothing is on its way.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from ...engine.waiting import nothing_is_under_way
from ..links import ALL_SILENT_S, Link, Links
from .dead_links import DeadLink, DeadLinks

log = logging.getLogger(__name__)

_QUESTIONS: Final = 5
"""How often it is looked whether a worker has answered, within the time in which it must."""
_TOLD_AFTER: Final = 3
"""After so many of them the user is told who is waited for."""
_STALLED_AFTER: Final = 3
"""After so many of them, in each of which all waited for what they waited for before, a message counts as lost."""


_LOOK_S: Final = 0.5
"""How often it is looked whether bytes move, while this driver waits for something that has not come at once."""
_DEAD_S: Final = (2.0, 12.0)
"""For how long none may at least and at most; later the system itself would end the connection."""


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
        self._beat_s = limit_s / _QUESTIONS
        self._look_s = min(_LOOK_S, self._beat_s / 2)
        dead_s = min(max(limit_s / 2, _DEAD_S[0]), _DEAD_S[1])
        self._dead_links = DeadLinks(math.ceil(dead_s * (1 / self._look_s - 1 / self._beat_s)))
        self._turn = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop asking."""
        self._over.set()
        self._thread.join()

    def _look(self, links: list[Link], *, may_ask: bool) -> None:
        """Look whether bytes move, where this driver has waited since the last time: others are asked only then."""
        own, generation = self._links.waiting, self._links.generation
        turn, self._turn = self._turn, own.turn
        if not turn or turn != own.turn or own.traffic is None:
            self._dead_links.forget()
            return
        rank = own.traffic.rank
        said = {link.rank: progress for link in links if (progress := link.progress()) is not None}
        said[rank] = own.progress(self._dead_links.transfers_of(rank))
        dead = self._dead_links.look(said)
        if dead is not None:
            self._report(generation, dead)
            self._dead_links.forget()
        for link in links if may_ask else ():
            link.ask_progress(self._dead_links.transfers_of(link.rank))

    def _report(self, generation: int, dead: DeadLink | None) -> None:
        if dead is None:
            self._links.report_stall(generation)
        else:
            self._links.report_dead_link(generation, dead.sender, dead.waiting)

    def _ask(self) -> None:
        told, stall, asked_s = False, Stall(), time.monotonic()
        excused = set[int]()
        while not self._over.wait(self._look_s):
            links = list(self._links)
            may_ask = time.monotonic() - asked_s < self._beat_s - self._look_s / 2
            self._look(links, may_ask=may_ask)
            if may_ask:  # or whoever says whether anything is on its way would see this question
                continue
            asked_s = time.monotonic()
            if self._is_only_driver and stall.lasts(self._links, _STALLED_AFTER):
                log.warning(
                    "the driver and its workers wait for each other, and nothing is on its way: a message is lost"
                )
                self._report(self._links.generation, self._dead_links.suspect)
            all_silent = len(links) > 1 and all(link.is_silent for link in links)
            if all_silent and not told:
                log.warning("no worker answers: waiting for %g s for the driver's own link", ALL_SILENT_S)
            told = all_silent
            # When the driver's link is back, not all are heard again at once.
            excused = {id(link) for link in links if all_silent or (link.is_silent and id(link) in excused)}
            for link in links:
                if link.num_unanswered == _TOLD_AFTER and not all_silent:
                    log.warning("%s has given no sign of life for some %g s of %g", link, self._since_s, self._limit_s)
                link.beat(_QUESTIONS + (id(link) in excused) * math.ceil(ALL_SILENT_S / self._limit_s * _QUESTIONS))
            for link in self._idle():
                if link.beat(_QUESTIONS):
                    log.warning("an idle worker is lost: %s", link.how_lost)
                    try:
                        self._fence(link)
                    except Exception as error:  # the source may be the user's; the others are still to be asked
                        log.warning("what is left of it could not be ended: %s: %s", type(error).__name__, error)
