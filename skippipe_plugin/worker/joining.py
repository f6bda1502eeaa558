"""How a worker process comes into a job and leaves it: started by the driver, or by hand on any machine."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import uuid
from dataclasses import dataclass
from types import FrameType
from typing import Final

from ..engine.channel import Channel, ChannelError, NobodyThere, connect
from ..engine.control.line import to_driver
from ..engine.control.presence import Hello, Outlive
from ..engine.device import own_place
from ..engine.errors import SkipPipeError
from ..engine.job_store import Address, JobStore, Members
from ..engine.versions import own_versions
from .service import DriverGone, Refused, Worker

log = logging.getLogger(__name__)

_RETRY_S: Final = 0.5
_LOOK_S: Final = 0.05
_CALL_S: Final = 0.2
_NOBODY_S: Final = 20.0
"""For how long a worker that has lost its driver looks for a store that may tell it of the next one."""


@dataclass(frozen=True, slots=True)
class _Self:
    """What a worker says of itself, to each driver that it joins."""

    name: str = ""
    ticket: str = ""
    device: str = ""


def parse_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``.

    >>> parse_address("10.0.0.5:29400")
    ('10.0.0.5', 29400)

    Raises:
        ValueError: It is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT, such as 10.0.0.5:29400; the driver's start line names its own")
    return host.strip("[]"), int(port)


def work(host: str, port: int, secret: str, ticket: str = "") -> None:
    """Join the driver that has this process started, and serve until it says so.

    Raises:
        DriverGone: It ended without a farewell.
        SkipPipeError: It refused this worker.
    """
    # Ctrl-C in a terminal reaches the whole process group; it is for the driver, which then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = _begin(connect(host, port, bytes.fromhex(secret)), _Self(ticket=ticket), signal.SIGTERM)
    worker.ends_with_driver = True
    _serve(worker)


def join(host: str, port: int, secret: str, *, wait_s: float, device: str = "") -> None:
    """Join a driver by hand, and serve until it ends; Ctrl-C and SIGTERM hand the stages over first.

    Args:
        host: The driver's host.
        port: Its port.
        secret: The job's, in hexadecimal.
        wait_s: For how many seconds a driver that is not there yet is waited for.
        device: What to compute on, such as ``"cuda:1"``; empty: the driver chooses among what this host has.

    Raises:
        SkipPipeError: The driver did not come, refused this worker, or is gone.
    """
    own, key = _Self(uuid.uuid4().hex, device=device), bytes.fromhex(secret)
    worker = _begin(_connect(host, port, key, wait_s), own, signal.SIGTERM, signal.SIGINT)
    log.warning("joined the driver at %s:%d; Ctrl-C or SIGTERM leaves it after the step", host, port)
    while True:
        try:
            _serve(worker)
            return
        except Refused:
            raise
        except (DriverGone, ChannelError) as error:
            channel = None
            if worker.next_driver is not None:
                log.warning("the driver is gone; waiting until skippipe run has started it again")
                channel = _dial_next(worker.next_driver, key, own)
            if channel is None:
                raise SkipPipeError(
                    f"the driver at {host}:{port} is gone: it ended, or the link broke. If the job goes on, join it "
                    "again"
                ) from error
            worker.rejoin(channel)


def _connect(host: str, port: int, secret: bytes, wait_s: float) -> Channel:
    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            return connect(host, port, secret, timeout_s=max(_RETRY_S, min(30.0, deadline - time.monotonic())))
        except NobodyThere as error:
            if time.monotonic() + _RETRY_S > deadline:
                raise SkipPipeError(
                    f"{error} (tried for {wait_s:g} s). Compare the address with the driver's start line, look for a "
                    "firewall, and let the driver listen where this machine can reach it: NetworkConfig(host=...)"
                ) from error
            if not told:
                log.warning("%s; trying for %g s", error, wait_s)
                told = True
            time.sleep(_RETRY_S)


def dial(store: JobStore, key: str, secret: bytes) -> Channel:
    """Join the driver whose address is in a store, as soon as there is one that answers.

    Args:
        store: Which outlives drivers.
        key: Where in the store the address is.
        secret: The job's.

    Raises:
        RuntimeError: The store is gone.
    """
    while True:
        channel = _try_to_dial(store, key, secret, _Self())
        if channel is not None:
            return channel
        time.sleep(_LOOK_S)


def _try_to_dial(store: JobStore, key: str, secret: bytes, own: _Self) -> Channel | None:
    address = store.driver(key)
    if address is not None:
        with contextlib.suppress(ChannelError):  # it is the address of the one before
            return _greet(connect(*address, secret), own)
    return None


def _dial_next(where: Outlive, secret: bytes, own: _Self) -> Channel | None:
    """Join the next driver by the first of the stores that is there; None when none has been for long.

    Whoever does not reach the first one says so to the next: a supervisor that stands by needs to hear it of most.
    """
    reached: dict[Address, JobStore] = {}
    seen_s, is_there = time.monotonic(), True
    while is_there and time.monotonic() - seen_s < _NOBODY_S:
        is_there = False
        for at, address in enumerate(where.stores):
            try:
                store = reached.pop(address, None) or JobStore.reach(*address)
                if at > 0:
                    store.call(own.name, where.key, Members(where.number, where.names))
                channel = _try_to_dial(store, where.key, secret, own)
            except ConnectionRefusedError:
                continue
            except (OSError, RuntimeError):  # it is cut off, or has just gone
                is_there = True
                continue
            if channel is not None:
                return channel
            reached[address], seen_s, is_there = store, time.monotonic(), True
            break
        time.sleep(_CALL_S)
    return None


def _greet(channel: Channel, own: _Self) -> Channel:
    place = own_place(own.device)
    to_driver(channel).send(Hello(own_versions(), os.getpid(), name=own.name, ticket=own.ticket, place=place))
    return channel


def _begin(channel: Channel, own: _Self, *polite: signal.Signals) -> Worker:
    """Join; leave politely at the first of the ``polite`` signals, at once where nobody minds."""
    worker = Worker(_greet(channel, own))

    def leave(number: int, frame: FrameType | None) -> None:
        if not worker.leave():
            os._exit(128 + number)

    for each in polite:
        signal.signal(each, leave)
    return worker


def _serve(worker: Worker) -> None:
    """Serve until told to exit."""
    while worker.serve() is not None:
        pass
