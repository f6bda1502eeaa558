"""The TCP connections between two processes of this host, silenced and reset from outside, without being root.

A process may have copies of its children's sockets (``pidfd_getfd``). A filter that drops every packet makes a socket
deaf; a filter on both ends makes their connection a cable that was cut: nothing is acknowledged, and nobody is told.
``connect`` to no address ends a connection with a reset. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PIDFD_GETFD: Final = 438
_SO_ATTACH_FILTER: Final = 26
_SO_DETACH_FILTER: Final = 27
_DROP: Final = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
"""A program of one instruction: return 0, of so many bytes of each packet is to be kept."""
_NO_ADDRESS: Final = ctypes.create_string_buffer(struct.pack("H14x", socket.AF_UNSPEC))
_libc: Final = ctypes.CDLL(None, use_errno=True)

Address = tuple[str, int]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def silence(end: socket.socket) -> None:
    """Let a socket receive nothing any more."""
    program = _Program(1, ctypes.addressof(_DROP))
    end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))


def unsilence(end: socket.socket) -> None:
    """Undo :func:`silence`."""
    with contextlib.suppress(OSError):  # it is closed
        end.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, struct.pack("i", 0))


def reset(end: socket.socket) -> None:
    """End a connection with a reset, such that this end sees it too, as it would if the reset had come from afar."""
    if _libc.connect(end.fileno(), _NO_ADDRESS, len(_NO_ADDRESS) - 1) != 0:
        raise _last_error()
    with contextlib.suppress(OSError):  # it is not connected any more, but so it is readable for who polls
        end.shutdown(socket.SHUT_RDWR)


def connections(first: int, second: int) -> list[tuple[socket.socket, socket.socket]]:
    """Return both ends of every TCP connection between two processes, as copies that the caller closes.

    Raises:
        OSError: The system does not let this process have them.
    """
    ours, theirs = dict(_ends(first)), dict(_ends(second))
    pairs = [(end, theirs.pop(key[::-1])) for key, end in ours.items() if key[::-1] in theirs]
    kept = {id(end) for pair in pairs for end in pair}
    for end in (*ours.values(), *theirs.values()):
        if id(end) not in kept:
            end.close()
    return pairs


def port_of(end: socket.socket) -> set[int]:
    """Return the ports of both ends of a connection."""
    return {address[1] for address in _addresses(end)}


def _ends(pid: int) -> Iterator[tuple[tuple[Address, Address], socket.socket]]:
    """Return copies of the connected TCP sockets of a process, by their own and their peer's address."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for file in list(Path(f"/proc/{pid}/fd").iterdir()):
            end = _copy(process, file)
            if end is None:
                continue
            try:
                own, peer = _addresses(end)
            except (OSError, ValueError):  # not TCP, or not connected
                end.close()
            else:
                yield (own, peer), end
    finally:
        os.close(process)


def _copy(process: int, file: Path) -> socket.socket | None:
    """Return a copy of a process's socket; None when the file is none, or closed by now."""
    try:
        if not str(file.readlink()).startswith("socket:"):
            return None
    except OSError:
        return None
    copy = _libc.syscall(_PIDFD_GETFD, process, int(file.name), 0)
    if copy < 0:
        error = _last_error()
        if isinstance(error, PermissionError):
            raise error
        return None
    end = socket.socket(fileno=copy)
    if end.type != socket.SOCK_STREAM or end.family not in (socket.AF_INET, socket.AF_INET6):
        end.close()
        return None
    return end


def _addresses(end: socket.socket) -> tuple[Address, Address]:
    own, peer = end.getsockname(), end.getpeername()
    return (own[0].removeprefix("::ffff:"), own[1]), (peer[0].removeprefix("::ffff:"), peer[1])


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
