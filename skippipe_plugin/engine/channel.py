"""The control channel: one authenticated TCP connection between a driver and a worker.

Control messages are small and few (step headers, optimizer steps, weights on request); activations and gradients
never pass here, see :mod:`skippipe_plugin.engine.transport`. A message is a kind, a JSON object and any number of
binary blobs. Nothing is parsed, and nothing unpickled, before both ends have proved that they know the job's secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import SkipPipeError

PROTOCOL_VERSION = 1
_MAGIC = b"SKPP"
_HEADER = struct.Struct("!4sHIIQ")  # magic, version, number of blobs, bytes of JSON, bytes of all blobs
_BLOB = struct.Struct("!Q")
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_GREETING = struct.Struct(f"!4sH{_NONCE_BYTES}s")

_MIN_RTT_AT = 148
"""Where Linux keeps tcpi_min_rtt, in microseconds, in struct tcp_info."""

MAX_JSON_BYTES = 64 << 20
MAX_BLOBS = 1 << 20
MAX_BLOB_BYTES = 1 << 40

Buffer = bytes | bytearray | memoryview


class ChannelError(SkipPipeError):
    """The peer is not one of ours, speaks another version, or sends what the limits forbid."""


class ChannelClosed(ChannelError):
    """The other end is gone."""


@dataclass(frozen=True, slots=True)
class Message:
    """One control message: ``kind``, JSON fields, binary attachments."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[Buffer] = ()


class Channel:
    """A connected, authenticated channel. Any thread may send; one thread at a time may receive."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(None)
        self._connection = connection
        self._send_lock = threading.Lock()
        self.heard_s = time.monotonic()
        """When the other end last sent anything, be it a part of a message."""

    @property
    def local_host(self) -> str:
        """The address of this end, as the other end can reach it."""
        return str(self._connection.getsockname()[0])

    @property
    def round_trip_s(self) -> float:
        """The shortest round trip that TCP has seen lately, without what queues add; 0 where that is not known."""
        if sys.platform != "linux":
            return 0.0
        try:
            info = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT_AT + 4)
        except OSError:  # closed
            return 0.0
        return int.from_bytes(info[_MIN_RTT_AT:], sys.byteorder) / 1e6

    def send(self, kind: str, fields: Mapping[str, Any] | None = None, blobs: Sequence[Buffer] = ()) -> None:
        """Send one message; raise ChannelClosed when the other end is gone."""
        with self._send_lock:
            self._send(kind, fields, blobs)

    def send_if_free(self, kind: str, fields: Mapping[str, Any] | None = None) -> bool:
        """Send a message unless another thread is sending one; return whether it was sent."""
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            self._send(kind, fields, ())
        finally:
            self._send_lock.release()
        return True

    def _send(self, kind: str, fields: Mapping[str, Any] | None, blobs: Sequence[Buffer]) -> None:
        text = json.dumps({"kind": kind, **(fields or {})}, separators=(",", ":")).encode()
        views = [memoryview(blob).cast("B") for blob in blobs]
        head = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, len(views), len(text), sum(view.nbytes for view in views))
        sizes = b"".join(_BLOB.pack(view.nbytes) for view in views)
        try:
            self._connection.sendall(head + sizes + text)
            for view in views:
                self._connection.sendall(view)
        except OSError as error:
            raise ChannelClosed(f"the control connection broke while sending {kind!r}: {error}") from error

    def receive(self) -> Message:
        """Wait for the next message; raise ChannelClosed when the other end is gone."""
        magic, version, num_blobs, json_bytes, blob_bytes = _HEADER.unpack(self._read(_HEADER.size))
        if magic != _MAGIC or version != PROTOCOL_VERSION:
            raise ChannelError(f"expected protocol {PROTOCOL_VERSION}, got {magic!r} version {version}")
        if json_bytes > MAX_JSON_BYTES or num_blobs > MAX_BLOBS or blob_bytes > MAX_BLOB_BYTES:
            raise ChannelError(f"a control message of {json_bytes} + {blob_bytes} bytes is over the limit")
        sizes = [_BLOB.unpack(self._read(_BLOB.size))[0] for _ in range(num_blobs)]
        if sum(sizes) != blob_bytes:
            raise ChannelError("the blobs of a control message do not add up to its header")
        fields = json.loads(self._read(json_bytes))
        return Message(fields.pop("kind"), fields, [self._read(size) for size in sizes])

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                count = self._connection.recv_into(view)
            except OSError as error:
                raise ChannelClosed(f"the control connection broke: {error}") from error
            if count == 0:
                raise ChannelClosed("the other end closed the control connection")
            view = view[count:]
            self.heard_s = time.monotonic()
        return data

    def close(self) -> None:
        """Close both directions; a thread blocked in :meth:`receive` gets ChannelClosed."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Listener:
    """Accepts channels on ``host:port`` (port 0: any free one); call :meth:`close` when done."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self._secret = secret
        try:
            self._socket = socket.create_server((host, port), backlog=128)
        except OSError as error:
            raise SkipPipeError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port, or 0 for any free one"
            ) from error
        self.host, self.port = self._socket.getsockname()[:2]

    def accept(self, timeout_s: float, handshake_s: float = 5.0) -> tuple[Channel, Message] | None:
        """Return the next authenticated channel and its first message; None after ``timeout_s`` or for a stranger."""
        self._socket.settimeout(timeout_s)
        try:
            connection, _ = self._socket.accept()
        except TimeoutError:
            return None
        connection.settimeout(handshake_s)
        try:
            _authenticate_server(connection, self._secret)
            channel = Channel(connection)
            connection.settimeout(handshake_s)
            greeting = channel.receive()
            connection.settimeout(None)
        except (OSError, ChannelError):
            connection.close()
            return None
        return channel, greeting

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


def connect(host: str, port: int, secret: bytes, timeout_s: float = 30.0) -> Channel:
    """Connect to a driver's listener and prove knowledge of ``secret``."""
    try:
        connection = socket.create_connection((host, port), timeout=timeout_s)
        _authenticate_client(connection, secret)
    except OSError as error:
        raise ChannelError(f"cannot join the driver at {host}:{port}: {error}") from error
    return Channel(connection)


def _authenticate_server(connection: socket.socket, secret: bytes) -> None:
    ours = os.urandom(_NONCE_BYTES)
    connection.sendall(_GREETING.pack(_MAGIC, PROTOCOL_VERSION, ours))
    theirs = _check_greeting(_read_exactly(connection, _GREETING.size))
    if not hmac.compare_digest(_read_exactly(connection, _MAC_BYTES), _mac(secret, b"worker", ours, theirs)):
        raise ChannelError("a process with the wrong secret tried to join")
    connection.sendall(_mac(secret, b"driver", theirs, ours))


def _authenticate_client(connection: socket.socket, secret: bytes) -> None:
    theirs = _check_greeting(_read_exactly(connection, _GREETING.size))
    ours = os.urandom(_NONCE_BYTES)
    connection.sendall(_GREETING.pack(_MAGIC, PROTOCOL_VERSION, ours) + _mac(secret, b"worker", theirs, ours))
    if not hmac.compare_digest(_read_exactly(connection, _MAC_BYTES), _mac(secret, b"driver", ours, theirs)):
        raise ChannelError("the driver does not know this job's secret")


def _check_greeting(data: bytes) -> bytes:
    magic, version, nonce = _GREETING.unpack(data)
    if magic != _MAGIC:
        raise ChannelError("the other end is not a skippipe process")
    if version != PROTOCOL_VERSION:
        raise ChannelError(f"the other end speaks protocol {version}, this one {PROTOCOL_VERSION}: install one version")
    return bytes(nonce)


def _mac(secret: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.new(secret, role + first + second, hashlib.sha256).digest()


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ChannelClosed("the other end closed the connection before it was authenticated")
        data += part
    return data
