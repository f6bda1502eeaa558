"""The open files of this process, to find those that a library has opened: it tells nobody which they are."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

_OWN_FILES: Final = Path("/proc/self/fd")


class OpenFile(NamedTuple):
    """An open file: its number is given anew as soon as it is closed, so the number alone does not tell it."""

    number: int
    inode: int


def open_files() -> set[OpenFile]:
    """Return all; none where the system does not tell."""
    found: set[OpenFile] = set()
    with contextlib.suppress(OSError):
        for file in _OWN_FILES.iterdir():
            with contextlib.suppress(OSError):  # closed by now, as what has listed them is
                found.add(OpenFile(int(file.name), os.fstat(int(file.name)).st_ino))
    return found


def sockets_among(files: Iterable[OpenFile]) -> Iterator[tuple[int, socket.socket]]:
    """Yield the numbers of those that are sockets, each with a copy that is closed when the next one is asked for."""
    for number, _ in files:
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
