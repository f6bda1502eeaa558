"""Tell a function that waits for ever from one that takes long.

Microbatches take turns, so what one of them holds while it is suspended (a lock) another one would wait for for ever.
Such a wait takes no processor time.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Final

from ...engine.errors import SkipPipeError

LOCK_S: Final = 5.0
"""For how long a function may wait for a lock while other microbatches are suspended."""
SLEEP_S: Final = 20.0
"""For how long it may do nothing else: sleeping and reading end by themselves, but some poll what they wait for."""
_IDLE: Final = 0.02
"""The share of processor time up to which a thread counts as waiting."""
_US: Final = __name__.partition(".")[0]


class StepBlocked(SkipPipeError):
    """A microbatch's function waits for what a suspended one holds."""


class Patience:
    """Follows one function at a time, from the moment it is given control."""

    def __init__(self) -> None:
        self._turn: object = None
        self._since_s = self._cpu_s = 0.0

    def waited_s(self, turn: object, now_s: float, cpu_s: float) -> float:
        """Return for how long the function has done nothing.

        Args:
            turn: Another value each time a function is given control.
            now_s: The time.
            cpu_s: The processor time that its thread has taken so far.
        """
        if turn is not self._turn or cpu_s - self._cpu_s > _IDLE * max(now_s - self._since_s, 0.5):
            self._turn, self._since_s, self._cpu_s = turn, now_s, cpu_s
        return now_s - self._since_s


def is_blocked(waited_s: float, thread: threading.Thread) -> bool:
    """Say whether ``thread``, which has done nothing for so long, will wait for ever."""
    if waited_s < LOCK_S or _waits_for_us(stack_of(thread)):
        return False
    return waited_s >= SLEEP_S or _may_wait_for_a_lock(thread)


def cpu_seconds(thread: threading.Thread) -> float:
    """Return the processor time of a thread; that of the process where threads have no clock."""
    if thread.ident is None or not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time()
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def stack_of(thread: threading.Thread) -> FrameType | None:
    """Return the innermost frame of a thread."""
    return sys._current_frames().get(thread.ident or 0)


def blocked(frame: FrameType | None, label: int, waited_s: float) -> StepBlocked:
    """Return the error for a function that waits in ``frame``."""
    stack = "".join(traceback.format_stack(frame)) if frame is not None else "(unknown)\n"
    return StepBlocked(
        f"the step of microbatch {label} has waited for {waited_s:.0f} s outside of the blocks while other "
        "microbatches of the batch wait at the blocks: they take turns, so what one of them holds while it calls the "
        "blocks (a lock, a semaphore, a place in a queue) the next one waits for without end. Hold it only before or "
        f"after the blocks, or set num_microbatches=1, which runs the step as one process does. It waits here:\n{stack}"
    )


def _waits_for_us(frame: FrameType | None) -> bool:
    """Whether the innermost code that is not the standard library's is ours: it waits for a worker."""
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in sys.stdlib_module_names:
            return package == _US
        frame = frame.f_back
    return False


def _may_wait_for_a_lock(thread: threading.Thread) -> bool:
    """Ask the system what the thread waits in; what it does not tell may be a lock."""
    try:
        place = Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()
    except OSError:
        return True
    return place in ("", "0") or "futex" in place or "lock" in place
