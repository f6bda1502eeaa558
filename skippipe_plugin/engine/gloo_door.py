"""The port that a gloo group listens on, shut as soon as its members are connected.

Gloo leaves it open for as long as the group lives, though nobody comes any more, and keeps a descriptor of each
stranger who connects, long after he has left: a port scanner that looks in once a minute ends a run of some weeks. It
offers no way to shut it. So its socket is replaced, under the same number, by a file on which nothing ever happens;
gloo later closes that as if it were its own.
"""

from __future__ import annotations

import os
import select
import socket
from dataclasses import dataclass
from typing import Any, Final

from .c10d import ProcessGroupGloo
from .own_files import is_epoll, open_files, sockets_among

_IS_POSSIBLE: Final = hasattr(os, "eventfd") and hasattr(select, "epoll")
_CONNECTS_LATER: Final = "TORCH_GLOO_LAZY_INIT"
"""torch's own switch: its groups connect when they are first used."""


@dataclass(frozen=True, slots=True)
class Door:
    """Descriptors of one gloo device."""

    listening: int
    loop: int
    """The epoll in which gloo waits for visitors."""

    def shut(self) -> None:
        """Refuse all further connections. The group's members must be connected with this one."""
        nothing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            with select.epoll.fromfd(os.dup(self.loop)) as loop:
                loop.unregister(self.listening)
                os.dup2(nothing, self.listening, inheritable=False)
                loop.register(self.listening, 0)  # gloo expects to find it there at the end
        finally:
            os.close(nothing)


def open_device(host: str) -> tuple[Any, Door | None]:  # Any: torch's stubs do not list devices
    """Make a gloo device that is bound to ``host``; return its door too, where that can be shut."""
    before = open_files()
    device = ProcessGroupGloo.create_device(hostname=host)
    fresh = open_files() - before
    listening = [n for n, copy in sockets_among(fresh) if copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]
    loops = [each.number for each in fresh if is_epoll(each.number)]
    connects_later = os.environ.get(_CONNECTS_LATER, "0") not in ("", "0")
    if not _IS_POSSIBLE or connects_later or len(listening) != 1 or len(loops) != 1:
        return device, None
    return device, Door(listening[0], loops[0])
