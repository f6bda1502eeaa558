"""The open files of this process, to find those that a library has opened: it tells nobody which they are."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_OWN_FILES: Final = Path("/proc/self/fd")


def open_files() -> set[int]:
    """Return their numbers; none where the system does not tell."""
    try:
        return {int(file.name) for file in _OWN_FILES.iterdir()}
    except OSError:
        return set()


def sockets_among(numbers: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """Yield the numbers that are sockets, each with a copy that is closed when the next one is asked for."""
    for number in numbers:
        with contextlib.suppress(OSError):  # closed by now
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as copy:
                    yield number, copy


def is_epoll(number: int) -> bool:
    """Whether an open file is an epoll."""
    try:
        return str((_OWN_FILES / str(number)).readlink()) == "anon_inode:[eventpoll]"
    except OSError:
        return False
