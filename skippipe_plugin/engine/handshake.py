"""How two processes prove to each other, over a fresh connection, that they know the job's secret.

Each sends a nonce; each answers with an HMAC of both nonces, of its own role and of what the connection is for, so
that nobody can play one end's answer back to it, nor lead a visitor to another door than the one that he came for. From
the same nonces come two keys, one for each direction, with which every later message is authenticated. Nothing is
encrypted. Before the proof a stranger can make this end read 70 bytes, and no more.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import hmac
import os
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Final

from .errors import SkipPipeError

PROTOCOL_VERSION: Final = 9
MAGIC: Final = b"SKPP"
MAC_BYTES: Final = hashlib.sha256().digest_size
_NONCE_BYTES: Final = 32
_GREETING: Final = struct.Struct(f"!4sH{_NONCE_BYTES}s")
_HOST: Final = b"host"
_GUEST: Final = b"guest"
_OTHERS: Final = {
    b"GET ": "HTTP",
    b"POST": "HTTP",
    b"HEAD": "HTTP",
    b"OPTI": "HTTP",
    b"PRI ": "HTTP",
    b"SSH-": "SSH",
    b"\x16\x03\x00": "TLS",
    b"\x16\x03\x01": "TLS",
    b"\x16\x03\x03": "TLS",
}
"""First bytes of protocols that scanners and misdirected clients speak."""


class ChannelError(SkipPipeError):
    """The peer is not one of ours, speaks another version, or sends what the limits forbid."""


class ChannelClosed(ChannelError):
    """The other end is gone."""


class Purpose(enum.Enum):
    """What a connection is for: who listens, and who comes."""

    JOIN_DRIVER = "driver", "worker"
    ASK_SUPERVISOR = "supervisor", "driver"

    @property
    def host(self) -> str:
        """Who listens."""
        return self.value[0]

    @property
    def guest(self) -> str:
        """Who comes."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one connection; they never leave the two processes."""

    sending: bytes = field(repr=False)
    receiving: bytes = field(repr=False)


def authenticate_guest(
    connection: socket.socket, secret: bytes, timeout_s: float, purpose: Purpose = Purpose.JOIN_DRIVER
) -> SessionKeys:
    """Do the part of who listens.

    Raises:
        ChannelError: The other end is a stranger, speaks another version, or took longer than ``timeout_s`` in all.
        OSError: The connection broke.
    """
    deadline_s = time.monotonic() + timeout_s
    ours = os.urandom(_NONCE_BYTES)
    with contextlib.suppress(ConnectionError):  # the next line says so
        connection.sendall(_GREETING.pack(MAGIC, PROTOCOL_VERSION, ours))
    theirs = _read_nonce(connection, deadline_s)
    proof = _read(connection, MAC_BYTES, deadline_s)
    meant = next((p for p in Purpose if hmac.compare_digest(proof, _mac(secret, _GUEST, p, ours, theirs))), None)
    if meant is None:
        raise ChannelError("it does not know this job's secret")
    if meant is not purpose:
        raise ChannelError(
            f"it is a {meant.guest} that came for the {meant.host}, but this is the {purpose.host}'s door: the "
            "driver's start line names the address to join"
        )
    connection.sendall(_mac(secret, _HOST, purpose, theirs, ours))
    return SessionKeys(
        sending=_mac(secret, b"from " + _HOST, purpose, ours, theirs),
        receiving=_mac(secret, b"from " + _GUEST, purpose, ours, theirs),
    )


def authenticate_host(
    connection: socket.socket, secret: bytes, timeout_s: float, purpose: Purpose = Purpose.JOIN_DRIVER
) -> SessionKeys:
    """Do the part of who comes; see :func:`authenticate_guest`."""
    deadline_s = time.monotonic() + timeout_s
    theirs = _read_nonce(connection, deadline_s)
    ours = os.urandom(_NONCE_BYTES)
    connection.sendall(_GREETING.pack(MAGIC, PROTOCOL_VERSION, ours) + _mac(secret, _GUEST, purpose, theirs, ours))
    try:
        proof = _read(connection, MAC_BYTES, deadline_s)
    except ChannelClosed as error:  # it has our proof, and turned away
        raise ChannelError(
            f"it knows another secret, or is no {purpose.host}: give both the same job's, and the address of its "
            "start line"
        ) from error
    if not hmac.compare_digest(proof, _mac(secret, _HOST, purpose, ours, theirs)):
        raise ChannelError("it does not know this job's secret")
    return SessionKeys(
        sending=_mac(secret, b"from " + _GUEST, purpose, theirs, ours),
        receiving=_mac(secret, b"from " + _HOST, purpose, theirs, ours),
    )


def _read_nonce(connection: socket.socket, deadline_s: float) -> bytes:
    start = _read(connection, len(MAGIC), deadline_s)  # what speaks something else may never send more
    if start != MAGIC:
        spoken = next((name for first, name in _OTHERS.items() if start.startswith(first)), "")
        raise ChannelError("it is not a skippipe process" + (f" but speaks {spoken}" if spoken else ""))
    _, version, nonce = _GREETING.unpack(start + _read(connection, _GREETING.size - len(start), deadline_s))
    if version != PROTOCOL_VERSION:
        raise ChannelError(f"it speaks protocol {version}, this one {PROTOCOL_VERSION}: install one version")
    return bytes(nonce)


def _read(connection: socket.socket, size: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < size:
        connection.settimeout(max(1e-3, deadline_s - time.monotonic()))
        try:
            part = connection.recv(size - len(data))
        except TimeoutError as error:
            raise ChannelError("it did not prove in time that it knows this job's secret") from error
        except ConnectionError:  # it left without having read what was sent to it
            part = b""
        if not part:
            raise ChannelClosed("it left before it had proved that it knows this job's secret")
        data += part
    return data


def _mac(secret: bytes, role: bytes, purpose: Purpose, first: bytes, second: bytes) -> bytes:
    return hmac.digest(secret, role + b" of " + purpose.name.encode() + first + second, "sha256")
