"""The driver's door: who connects proves that he knows the job's secret, or is sent away with a line in the log.

Every visitor is met in a thread of its own, so that a silent one keeps nobody waiting. There is room for a fixed number
of them; when it is full, the one that has been there longest makes room, because who knows the secret needs a few
round trips only.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from typing import Final

from .channel import Channel, ChannelError, Message, host_and_port
from .errors import SkipPipeError
from .handshake import authenticate_worker

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.2
_QUIET_S: Final = 60.0
_MAX_REASONS: Final = 256


class Listener:
    """Accepts channels on ``host:port`` (port 0: any free one); call :meth:`close` when done.

    Args:
        host: The address to bind to, and no other.
        port: The port, or 0 for any free one.
        secret: What visitors must know.
        handshake_s: How long a visitor may take to prove it.
        max_visitors: How many may be at it at a time.

    Raises:
        SkipPipeError: The address is not ours or the port is taken.
    """

    def __init__(
        self, host: str, port: int, secret: bytes, *, handshake_s: float = 5.0, max_visitors: int = 64
    ) -> None:
        self._secret = secret
        self._handshake_s = handshake_s
        self._max_visitors = max_visitors
        self._socket = listen(host, port)
        self._socket.settimeout(_LOOK_S)
        self.host, self.port = self._socket.getsockname()[:2]
        self._arrived: queue.SimpleQueue[tuple[Channel, Message]] = queue.SimpleQueue()
        self._visitors: list[_Visitor] = []
        self._lock = threading.Lock()
        self._refusals = Refusals()
        self._closing = threading.Event()
        self._door = threading.Thread(target=self._open, name="door", daemon=True)
        self._door.start()

    def accept(self, timeout_s: float) -> tuple[Channel, Message] | None:
        """Return the next authenticated channel and its first message; None when none came in time."""
        try:
            return self._arrived.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Stop listening; send away who is at the door, or came in and was not accepted."""
        self._closing.set()
        self._door.join()
        self._socket.close()
        for visitor in self._send_away(0, "the driver stops listening"):
            visitor.thread.join()
        while (arrived := self.accept(0)) is not None:
            arrived[0].close()
        self._refusals.report()

    def _open(self) -> None:
        while not self._closing.is_set():
            try:
                connection, address = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:  # out of file descriptors, or the visitor has left again
                self._refusals.note("an unknown address", f"it cannot be accepted ({error.strerror})")
                self._closing.wait(_LOOK_S)
                continue
            visitor = _Visitor(connection, host_and_port(address))
            visitor.thread = threading.Thread(target=self._meet, args=(visitor,), name="visitor", daemon=True)
            with self._lock:
                self._visitors.append(visitor)
            visitor.thread.start()
            self._send_away(self._max_visitors, "too many others came before it had proved that it knows the secret")

    def _send_away(self, but: int, reason: str) -> list[_Visitor]:
        """Wake and end the threads of all but the newest visitors; return those that go."""
        with self._lock:
            going = self._visitors[: max(0, len(self._visitors) - but)]
            for visitor in going:
                visitor.sent_away = reason
                with contextlib.suppress(OSError):  # it has left by itself
                    visitor.connection.shutdown(socket.SHUT_RDWR)
            return going

    def _meet(self, visitor: _Visitor) -> None:
        refused = ""
        try:
            keys = authenticate_worker(visitor.connection, self._secret, self._handshake_s)
            channel = Channel(visitor.connection, keys)
            visitor.connection.settimeout(self._handshake_s)
            greeting = channel.receive()
            visitor.connection.settimeout(None)
        except (OSError, ChannelError) as error:
            refused = str(error)
        with self._lock:
            self._visitors.remove(visitor)
        if refused or visitor.sent_away:
            visitor.connection.close()
            self._refusals.note(visitor.address, visitor.sent_away or refused)
        else:
            self._arrived.put((channel, greeting))


class _Visitor:
    """A connection that is not authenticated yet."""

    thread: threading.Thread

    def __init__(self, connection: socket.socket, address: str) -> None:
        self.connection = connection
        self.address = address
        self.sent_away = ""


class Refusals:
    """Says in the log who was refused and why: one line for each host and reason in a minute, whatever they try."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def note(self, address: str, reason: str) -> None:
        """Log a refusal, or count it when its like was logged a moment ago."""
        key, now_s = (address.rpartition(":")[0], reason), time.monotonic()
        with self._lock:
            said_s, more = self._said.get(key, (-_QUIET_S, 0))
            if now_s - said_s < _QUIET_S:
                self._said[key] = said_s, more + 1
                return
            self._said.pop(key, None)
            if len(self._said) == _MAX_REASONS:
                self._said.pop(next(iter(self._said)))
            self._said[key] = now_s, 0
        log.warning("refused a connection from %s: %s%s", address, reason, _and_more(more))

    def report(self) -> None:
        """Log what was only counted."""
        with self._lock:
            said, self._said = self._said, {}
        for (host, reason), (_, more) in said.items():
            if more:
                log.warning("refused connections from %s: %s%s", host, reason, _and_more(more))


def listen(host: str, port: int) -> socket.socket:
    """Bind to exactly ``host:port`` and listen there.

    Raises:
        SkipPipeError: That is not possible.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=128)
    except OSError as error:
        raise SkipPipeError(
            f"cannot listen on {host}:{port} ({error.strerror}); the host must be an address of this machine; choose "
            "another port, or 0 for any free one"
        ) from error


def _and_more(count: int) -> str:
    return f" (and {count} more like it)" if count else ""
