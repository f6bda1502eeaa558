"""The fits of a script under ``skippipe run``, and what the drivers before this one have left of them on workers."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from ..driver.pool import WorkerPool
from ..driver.recovery.recall import Recalled, recall, recall_result
from ..supervisor import SupervisedProcesses
from .roll import RollCall, drop

log = logging.getLogger(__name__)

_REJOIN_S: Final = 60.0
_LOOK_S: Final = 0.05


class Fits:
    """Counts the fits of this process: the third fit of a script is the third one again when it is started again.

    Args:
        pool: Where workers join.
        processes: The workers that have outlived the last driver.
        roll: Those of them that nobody here has started.
    """

    def __init__(self, pool: WorkerPool, processes: SupervisedProcesses, roll: RollCall) -> None:
        self._pool = pool
        self._count = 0
        self._recalled: Recalled | None = None
        self._lost = processes.attempt > 0
        if self._lost:
            _await(pool, processes, roll)
            present = pool.idle()
            self._recalled = recall(present)
            for ticket in [link.ticket for link in present if link.gone and link.ticket]:
                processes.kill(ticket)  # whoever gave no sign of life; no harm if it has ended
        roll.is_over = True

    def next(self) -> tuple[int, Recalled | None, dict[str, Any] | None]:
        """Count a fit; return its number, and what it goes on from or has ended with, if a driver was lost."""
        self._count += 1
        recalled, result = self._recalled, recall_result(self._pool.idle(), self._count) if self._lost else None
        is_lost_fit = recalled is not None and recalled.fit == self._count
        if is_lost_fit:
            self._recalled = None
        if result is not None or is_lost_fit:
            return self._count, None if result is not None else recalled, result
        if recalled is not None and recalled.fit > self._count:
            log.warning(
                "fit %d of the script runs again from its beginning, because the worker that kept its result is gone; "
                "fit %d, in which the driver was lost, will go on where it was",
                self._count,
                recalled.fit,
            )
        elif self._lost and self._count == 1:
            log.warning("there is nothing to go on from: the first fit starts from its beginning")
        return self._count, None, None

    def settle(self) -> None:
        """Everything stands anew on the workers that are used: the others may forget what they hold."""
        for link in self._pool.resting():  # who gives no sign of life now may wake up
            drop(link)


def _await(pool: WorkerPool, processes: SupervisedProcesses, roll: RollCall) -> None:
    """Wait for the workers that have outlived the last driver."""
    deadline_s, missing, absent = time.monotonic() + _REJOIN_S, set(processes.running()), set(roll.awaited)
    while (missing or absent) and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)
        missing = set(processes.running()) - pool.joined
        absent = set(roll.awaited) - {link.name for link in pool.idle()}
    if absent:
        log.warning("%d workers that had joined by hand do not come back", len(absent))
    if missing:
        log.warning("workers with the process ids %s are there but do not join; they are ended", sorted(missing))
    for ticket in missing:
        processes.kill(ticket)
