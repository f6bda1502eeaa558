"""An end for connections whose other end is silent, where a library makes them and sets none.

Nobody tells either end that a cable was cut. A receiver has nothing to notice; the sender's kernel has, since what it
sends is never acknowledged, but by itself it tries for a quarter of an hour.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping

from .own_files import OpenFile, open_files, sockets_among


def set_signs_of_life(connection: socket.socket, options: Mapping[str, int]) -> None:
    """Have the system ask whether the other end is there; ``options`` of TCP by name, those that the platform has."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@contextlib.contextmanager
def silence_ends_after(seconds: float) -> Iterator[set[OpenFile]]:
    """Let every TCP connection that this process makes meanwhile break when what it sends stays untaken for so long.

    Yields what afterwards holds these connections.
    """
    before, made = open_files(), set[OpenFile]()
    yield made
    options = {
        "TCP_USER_TIMEOUT": int(seconds * 1000),
        # Who only receives has nothing untaken: it must ask.
        "TCP_KEEPIDLE": max(1, int(seconds / 3)),
        "TCP_KEEPINTVL": max(1, int(seconds / 5)),
    }
    fresh = {file.number: file for file in open_files() - before}
    for number, copy in sockets_among(fresh.values()):
        if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # reset by now
                set_signs_of_life(copy, options)
            made.add(fresh[number])
