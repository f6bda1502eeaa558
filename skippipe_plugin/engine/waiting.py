"""Whether a rank waits for others, as they may ask: where all do and nothing is on its way, a message was lost.

Gloo forgets messages whose connection breaks as they are written. Mostly an end of that connection notices; where none
does, everybody lives and waits for ever.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Final

from .control.presence import Progress
from .own_files import open_files, sockets_among
from .traffic import Awaited, Traffic, Transfer

_UNREAD: Final = 0x541B
_UNTAKEN: Final = 0x5411
"""Linux' numbers for the bytes that came and nobody has read, and for those that left and nobody has taken."""


class Waiting:
    """What the thread that has made this waits for: entered, or begun and ended, while it does.

    Other threads do so without an effect.
    """

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._count = 0
        self.turn = 0
        """The how-many-eth time it waits; 0 while it does not."""
        self.traffic: Traffic | None = None
        """Of the generation at present."""
        self._awaited: Callable[[], Awaited] | None = None

    def begin(self, awaited: Callable[[], Awaited] | None = None) -> None:
        """Say that the calling thread waits from now on, and for what: asked only if somebody asks."""
        if threading.get_ident() == self._owner:
            self._awaited = awaited
            self._count += 1
            self.turn = self._count

    def end(self, *_: object) -> None:
        """Say that it does no more."""
        if threading.get_ident() == self._owner:
            self.turn = 0
            self._awaited = None

    __enter__ = begin
    __exit__ = end

    def progress(self, asked: Sequence[Transfer] = ()) -> Progress:
        """Say what is waited for, whether bytes move meanwhile, and which of the transfers this rank has begun."""
        awaited, traffic = self._awaited, self.traffic
        turn = self.turn
        if traffic is None:
            return Progress(turn)
        begun = [transfer for transfer in asked if traffic.has_begun(transfer)]
        if not turn or awaited is None:
            return Progress(turn, begun=begun)
        what = awaited()
        return Progress(turn, what.transfer, what.ranks, traffic.num_moved(), begun)

    def is_quiet(self) -> bool:
        """Whether it waits and nothing is on its way to or from this process."""
        return self.turn > 0 and nothing_is_under_way()


def nothing_is_under_way() -> bool:
    """Whether all that this process has sent by TCP is taken and all that came is read; False where nobody can tell."""
    if not sys.platform.startswith("linux"):
        return False
    num_connections = 0
    for _, copy in sockets_among(open_files()):
        if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
            continue
        with contextlib.suppress(OSError):  # it listens, or is closed by now
            if _bytes(copy, _UNTAKEN) or _bytes(copy, _UNREAD):
                return False
            num_connections += 1
    return num_connections > 0


def _bytes(connection: socket.socket, number: int) -> int:
    import fcntl  # there is none on Windows

    return int.from_bytes(fcntl.ioctl(connection, number, bytes(4)), sys.byteorder)
