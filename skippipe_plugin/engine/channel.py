"""The control channel: one authenticated TCP connection between a driver and a worker.

Control messages are small and few (step headers, optimizer steps, weights on request); activations and gradients
never pass here, see :mod:`skippipe_plugin.engine.transport`. A message is a kind, a JSON object and any number of
binary blobs, proved with a key of this connection and direction and with the message's number
(:mod:`skippipe_plugin.engine.sealed`). Nothing is parsed, nothing unpickled, no length believed and no byte counted as
a sign of life before both ends have proved that they know the job's secret and before the message's own proof is
right: who can only alter or add to what is on the wire can end the connection, and nothing else.

Both ends count the messages of each direction, so every request has a number, and an answer names the one that it
belongs to. An answer that comes when nobody waits for it any more is told from that to the next question.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .handshake import ChannelClosed, ChannelError, Purpose, SessionKeys, authenticate_host
from .sealed import Buffer, Opener, Sealer
from .silence import set_signs_of_life

__all__ = ["Buffer", "Channel", "ChannelClosed", "ChannelError", "Message", "NobodyThere", "connect", "host_and_port"]

_MOST_BUFFERS: Final = 256
"""How many the kernel is given at once; it takes 1024."""
_JOINED_BYTES: Final = 16 << 10
"""Smaller messages are copied into one buffer: that is cheaper than to gather them."""
_MIN_RTT_AT = 148
"""Where Linux keeps tcpi_min_rtt, in microseconds, in struct tcp_info."""
_AS_JSON: Final = json.JSONEncoder(separators=(",", ":")).encode
_SIGNS_OF_LIFE: Final = {
    "TCP_KEEPIDLE": 10,  # seconds of silence before the other host is asked
    "TCP_KEEPINTVL": 5,  # and between two questions
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 30_000,  # milliseconds for which the other host may leave untaken what was sent
}
"""A link counts as broken after 30 s without a sign of the other *host*: nobody tells this end that a cable was cut.

The kernels ask and answer, so a process that is only paused, or busy, keeps its links.
"""


class NobodyThere(ChannelError):
    """Nothing listens at an address, or not yet."""


@dataclass(frozen=True, slots=True)
class Message:
    """One control message: ``kind``, JSON fields, binary attachments."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    blobs: Sequence[Buffer] = ()
    number: int = -1
    """The how-many-eth message of its end of the connection it is, from 0."""
    answers: int = -1
    """The number of the other end's message that it answers; -1: none in particular."""


class Channel:
    """A connected, authenticated channel. Any thread may send; one thread at a time may receive."""

    def __init__(self, connection: socket.socket, keys: SessionKeys, secret: bytes = b"") -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_signs_of_life(connection, _SIGNS_OF_LIFE)
        connection.settimeout(None)
        self._connection = connection
        self._secret = secret
        self._sending = Sealer(keys.sending)
        self._receiving = Opener(keys.receiving, self._fill, self._hear)
        self._send_lock = threading.Lock()
        self._kept: list[bytes] = []
        """What goes out with the next message."""
        self.heard_s = time.monotonic()
        """When the other end last sent anything that is proved, be it a part of a message."""

    def connect_to(self, host: str, port: int) -> Channel:
        """Connect to another listener of the same job, with the secret that opened this channel by :func:`connect`."""
        return connect(host, port, self._secret)

    @property
    def local_host(self) -> str:
        """The address of this end, as the other end can reach it."""
        return str(self._connection.getsockname()[0])

    @property
    def peer(self) -> str:
        """The address and port of the other end; empty when the connection is gone."""
        try:
            return host_and_port(self._connection.getpeername())
        except OSError:
            return ""

    @property
    def is_local(self) -> bool:
        """Whether the other end is on this host, as far as addresses tell."""
        try:
            return bool(self._connection.getpeername()[0] == self._connection.getsockname()[0])
        except OSError:  # closed
            return False

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

    def send(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        blobs: Sequence[Buffer] = (),
        *,
        answers: int | None = None,
        more: bool = False,
    ) -> int:
        """Send one message, and return its number.

        Args:
            kind: What it is.
            fields: JSON.
            blobs: What comes with it.
            answers: The number of the message that it answers, -1 for none; by default the last one received.
            more: Another one follows at once, and nobody waits for what this one asks before: a small message is then
                kept, and goes out with the next one, which saves both ends a call of the system and a waking.

        Raises:
            ChannelClosed: The other end is gone.
        """
        with self._send_lock:
            text = as_text(kind, fields or {}, self._receiving.count - 1 if answers is None else answers)
            return self._send(kind, text, blobs, more)

    def send_text(self, kind: str, text: bytes, blobs: Sequence[Buffer] = (), *, more: bool = False) -> int:
        """Do as :meth:`send` with a text that :func:`as_text` made, for several channels."""
        with self._send_lock:
            return self._send(kind, text, blobs, more)

    def send_if_free(self, kind: str, fields: Mapping[str, Any] | None = None) -> bool:
        """Send a message unless another thread is sending one; return whether it was sent."""
        if not self._send_lock.acquire(blocking=False):
            return False
        try:
            self._send(kind, as_text(kind, fields or {}), (), False)
        finally:
            self._send_lock.release()
        return True

    def _send(self, kind: str, text: bytes, blobs: Sequence[Buffer], more: bool) -> int:
        views = [memoryview(blob).cast("B") for blob in blobs] if blobs else ()
        number = self._sending.count
        try:
            for piece in self._sending.seal(text, views):
                if more and sum(map(len, piece)) <= _JOINED_BYTES:
                    self._kept.append(b"".join(piece))
                else:
                    self._put([*self._take_kept(), *piece])
        except OSError as error:
            raise ChannelClosed(f"the control connection broke while sending {kind!r}: {error}") from error
        return number

    def _take_kept(self) -> list[bytes]:
        kept, self._kept = self._kept, []
        return kept

    def _put(self, buffers: Sequence[Buffer]) -> None:
        if sum(map(len, buffers)) <= _JOINED_BYTES:
            self._connection.sendall(b"".join(buffers))
            return
        left = [memoryview(buffer) for buffer in buffers]
        while left:
            sent = self._connection.sendmsg(left[:_MOST_BUFFERS])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]

    def hang_up(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Close, with a last message if it can be sent without waiting for anybody."""
        if self._send_lock.acquire(blocking=False):
            with contextlib.suppress(OSError):
                for piece in self._sending.seal(as_text(kind, fields)):
                    self._connection.send(b"".join([*self._take_kept(), *piece]), socket.MSG_DONTWAIT)
            self._send_lock.release()
        self.close()

    def receive(self) -> Message:
        """Wait for the next message.

        Raises:
            ChannelClosed: The other end is gone.
            ChannelError: What came is over the limits, was altered on its way, or is no message.
        """
        body = self._receiving.open()
        return _parse(body.text, body.blobs, self._receiving.count - 1)

    def _hear(self) -> None:
        self.heard_s = time.monotonic()

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                count = self._connection.recv_into(view)
            except OSError as error:
                raise ChannelClosed(f"the control connection broke: {error}") from error
            if count == 0:
                raise ChannelClosed("the other end closed the control connection")
            view = view[count:]

    def close(self) -> None:
        """Close both directions; a thread blocked in :meth:`receive` gets ChannelClosed."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def connect(
    host: str, port: int, secret: bytes, timeout_s: float = 30.0, purpose: Purpose = Purpose.JOIN_DRIVER
) -> Channel:
    """Connect to a listener of this job, and prove knowledge of ``secret`` for one purpose.

    Raises:
        NobodyThere: Nothing listens at the address, or it cannot be reached.
        ChannelError: What listens there is not of this job, or there for something else.
    """
    try:
        connection = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise NobodyThere(f"cannot join the {purpose.host} at {host}:{port}: {error}") from error
    try:
        return Channel(connection, authenticate_host(connection, secret, timeout_s, purpose), secret)
    except BaseException as error:
        connection.close()
        if isinstance(error, (OSError, ChannelError)):
            raise ChannelError(f"cannot join the {purpose.host} at {host}:{port}: {error}") from error
        raise


def host_and_port(address: tuple[Any, ...]) -> str:  # Any: IPv6 addresses have four parts
    """Write a socket's address for people."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def as_text(kind: str, fields: Mapping[str, Any], answers: int = -1) -> bytes:
    """Return a message as it is sent, its blobs aside; ``answers`` is the number of what it answers, -1 for none."""
    said = {"kind": kind, "answers": answers} if answers >= 0 else {"kind": kind}
    return _AS_JSON({**fields, **said}).encode()


def _parse(text: bytearray, blobs: Sequence[Buffer], number: int) -> Message:
    try:
        fields = json.loads(text.decode())  # of bytes it would guess the encoding each time
        kind, answers = fields.pop("kind"), fields.pop("answers", -1)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ChannelError("a control message is not a JSON object with a kind") from error
    if not isinstance(kind, str):
        raise ChannelError(f"a control message is of kind {kind!r}, which is no name")
    if type(answers) is not int:
        raise ChannelError(f"a control message answers {answers!r}, which is no number")
    return Message(kind, fields, blobs, number, answers)
