"""The driver's door: who connects proves that he knows the job's secret, or is sent away with a line in the log.

Every visitor is met in a thread of its own, so that a silent one keeps nobody waiting. There is room for a fixed number
of them; when it is full, the one that has been there longest makes room, because who knows the secret needs a few
round trips only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import queue
import re
import socket
import threading
import time
from collections import deque
from typing import Final

from .channel import Channel, ChannelError, Message, host_and_port
from .errors import SkipPipeError
from .handshake import Purpose, authenticate_guest

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.2
_QUIET_S: Final = 60.0
_MAX_REASONS: Final = 256
_MAX_LINES: Final = 30


class Listener:
    """Accepts channels on ``host:port`` (port 0: any free one); call :meth:`close` when done.

    Args:
        host: The address to bind to, and no other.
        port: The port, or 0 for any free one.
        secret: What visitors must know.
        handshake_s: How long a visitor may take to prove it.
        max_visitors: How many may be at it at a time.
        purpose: What they come for.

    Raises:
        SkipPipeError: The address is not ours or the port is taken.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        *,
        handshake_s: float = 5.0,
        max_visitors: int = 64,
        purpose: Purpose = Purpose.JOIN_DRIVER,
    ) -> None:
        self._secret = secret
        self._purpose = purpose
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
            keys = authenticate_guest(visitor.connection, self._secret, self._handshake_s, self._purpose)
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
    """Says in the log who was refused and why: one line for each host and kind of reason in a minute.

    Whatever strangers try: numbers that they choose make no other reason, the addresses of one IPv6 network are one
    host, and in all there are 30 lines a minute.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], tuple[float, int]] = {}
        self._lines: deque[float] = deque(maxlen=_MAX_LINES)
        """When the last lines were written."""
        self._lock = threading.Lock()

    def note(self, address: str, reason: str) -> None:
        """Log a refusal, or count it when its like was logged a moment ago."""
        key, now_s = (_network_of(address), re.sub(r"\d+", "#", reason)), time.monotonic()
        with self._lock:
            said_s, more = self._said.get(key, (-_QUIET_S, 0))
            is_full = len(self._lines) == _MAX_LINES and now_s - self._lines[0] < _QUIET_S
            if now_s - said_s < _QUIET_S or (is_full and key in self._said):
                self._said[key] = said_s, more + 1
                return
            if is_full:
                return
            self._said.pop(key, None)
            if len(self._said) == _MAX_REASONS:
                self._said.pop(next(iter(self._said)))
            self._said[key] = now_s, 0
            self._lines.append(now_s)
        log.warning("refused a connection from %s: %s%s", address, reason, _and_more(more))

    def report(self) -> None:
        """Log what was only counted."""
        with self._lock:
            said, self._said = self._said, {}
        for (host, reason), (_, more) in said.items():
            if more:
                log.warning("refused connections from %s: %s%s", host, reason, _and_more(more))


def is_every_address(host: str) -> bool:
    """Whether ``host`` is a way to write "all interfaces", as the system's resolver understands addresses.

    >>> [is_every_address(each) for each in ("0.0.0.0", "0", "0x0", "::", "::ffff:0.0.0.0", "127.0.0.1", "a.host")]
    [True, True, True, True, True, False, False]
    """
    try:
        found = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )
    except (OSError, ValueError):  # a name, which is not asked about here, or what can be none
        return False
    return any(_is_unspecified(str(address[0])) for _, _, _, _, address in found)


def _is_unspecified(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_unspecified


def listen(host: str, port: int) -> socket.socket:
    """Bind to exactly ``host:port`` and listen there.

    Raises:
        SkipPipeError: That is not possible, or the host means all addresses of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if _is_unspecified(str(address[0])):
            raise SkipPipeError(every_address(host))
        return socket.create_server(address, family=family, backlog=128)
    except (OSError, ValueError) as error:  # the latter: letters that no host's name has
        reason = getattr(error, "strerror", None) or error
        raise SkipPipeError(
            f"cannot listen on {host}:{port} ({reason}); the host must be an address of this machine; choose "
            "another port, or 0 for any free one"
        ) from error


def every_address(host: str) -> str:
    """Say why all addresses of a machine are not listened on."""
    return (
        f"host={host!r} means every address of this machine, which no worker could reach and every stranger could; "
        "name that of the interface by which workers come"
    )


def _network_of(address: str) -> str:
    """Return the host of an address and port; for IPv6 its network, of which one host has all addresses."""
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        parsed = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
            return str(ipaddress.ip_network((parsed, 64), strict=False))
    return host


def _and_more(count: int) -> str:
    return f" (and {count} more like it)" if count else ""
