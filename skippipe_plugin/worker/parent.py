"""What makes a process end with the one that started it, however that one went.

This imports neither torch nor anything that does: a process that has just been started takes seconds for that, in which
it could notice nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

PARENT_VARIABLE: Final = "SKIPPIPE_PARENT"
"""In the environment of a process that another one of the job has started: that one's process id."""
_STAYS_VARIABLE: Final = "SKIPPIPE_PARENT_STAYS"
"""Beside it: whether the thread that has started it lives as long as its process."""
_LOOK_S: Final = 0.2
_GRACE_S: Final = 2.0
"""For how long a process may still finish what it is at when its parent is gone."""
_PR_SET_PDEATHSIG: Final = 1


def of_this_process(*, thread_stays: bool | None = None) -> dict[str, str]:
    """Return what tells a child, by its environment, whose it is.

    Args:
        thread_stays: Whether the calling thread lives as long as the process; by default whether it is the main one.
    """
    stays = threading.current_thread() is threading.main_thread() if thread_stays is None else thread_stays
    return {PARENT_VARIABLE: str(os.getpid()), _STAYS_VARIABLE: str(int(stays))}


def is_child() -> bool:
    """Whether this process was started by another one of the job, which is there."""
    return os.environ.get(PARENT_VARIABLE) == str(os.getppid())


def end_with_parent() -> None:
    """End this process when the one that started it is gone, at once; nothing happens where no one of the job did."""
    if not is_child():
        return
    if os.environ.get(_STAYS_VARIABLE) == "1" and (die := death_with_parent()):
        die()
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()


def end_with_stdin() -> None:
    """End this process two seconds after the other end of stdin was closed."""
    threading.Thread(target=_await_stdin, name="stdin watch", daemon=True).start()


def death_with_parent() -> Callable[[], None] | None:
    """Return what has the system end the process that calls it when its parent ends, even while it is paused.

    For Linux a parent is a thread, not a process; None on systems where a process cannot ask for that.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch(parent: int) -> None:
    # A control connection tells less: what the parent has forked, such as a DataLoader's worker, may hold its end open.
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


def _await_stdin() -> None:
    os.read(0, 1)  # the parent holds the other end of stdin and never writes
    time.sleep(_GRACE_S)
    os._exit(1)
