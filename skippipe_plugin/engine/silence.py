"""An end for connections whose other end is silent, where a library makes them and sets none.

Nobody tells either end that a cable was cut. A receiver has nothing to notice; the sender's kernel has, since what it
sends is never acknowledged, but by itself it tries for a quarter of an hour.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

_OWN_FILES = Path("/proc/self/fd")


@contextlib.contextmanager
def silence_ends_after(seconds: float) -> Iterator[None]:
    """Let every TCP connection that this process makes meanwhile break when what it sends stays untaken for so long."""
    before = _open_files()
    yield
    for number in _open_files() - before:
        with contextlib.suppress(OSError):  # closed by now
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                _limit(os.dup(number), seconds)


def _limit(number: int, seconds: float) -> None:
    with socket.socket(fileno=number) as copy:
        if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
            copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
            # Who only receives has nothing untaken: it must ask.
            copy.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(seconds / 3)))
            copy.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(seconds / 5)))


def _open_files() -> set[int]:
    """Return the numbers of the open files of this process; none where the system does not tell."""
    try:
        return {int(file.name) for file in _OWN_FILES.iterdir()} if hasattr(socket, "TCP_USER_TIMEOUT") else set()
    except OSError:
        return set()
