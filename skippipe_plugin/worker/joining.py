"""How a worker process comes into a job and leaves it: started by the driver, or by hand on any machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
import uuid
from datetime import timedelta
from types import FrameType
from typing import Final

from ..engine.c10d import TCPStore
from ..engine.channel import Channel, ChannelError, NobodyThere, connect
from ..engine.control.line import to_driver
from ..engine.control.presence import Hello, Outlive
from ..engine.errors import SkipPipeError
from ..engine.versions import own_versions
from .service import DriverGone, Refused, Worker

log = logging.getLogger(__name__)

_RETRY_S: Final = 0.5
_LOOK_S: Final = 0.05
_STORE_ANSWERS: Final = timedelta(seconds=20)


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
    worker = _begin(connect(host, port, bytes.fromhex(secret)), "", signal.SIGTERM, ticket=ticket)
    worker.ends_with_driver = True
    _serve(worker)


def join(host: str, port: int, secret: str, *, wait_s: float) -> None:
    """Join a driver by hand, and serve until it ends; Ctrl-C and SIGTERM hand the stages over first.

    Args:
        host: The driver's host.
        port: Its port.
        secret: The job's, in hexadecimal.
        wait_s: For how many seconds a driver that is not there yet is waited for.

    Raises:
        SkipPipeError: The driver did not come, refused this worker, or is gone.
    """
    name, key = uuid.uuid4().hex, bytes.fromhex(secret)
    worker = _begin(_connect(host, port, key, wait_s), name, signal.SIGTERM, signal.SIGINT)
    log.warning("joined the driver at %s:%d; Ctrl-C or SIGTERM leaves it after the step", host, port)
    while True:
        try:
            _serve(worker)
            return
        except Refused:
            raise
        except (DriverGone, ChannelError) as error:
            gone = (
                f"the driver at {host}:{port} is gone: it ended, or the link broke. If the job goes on, join it again"
            )
            if worker.next_driver is None:
                raise SkipPipeError(gone) from error
            log.warning("the driver is gone; waiting until skippipe run has started it again")
            try:
                worker.rejoin(_dial_next(worker.next_driver, key, name))
            except RuntimeError as nobody:  # the store is gone
                raise SkipPipeError(gone) from nobody


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


def dial(store: TCPStore, key: str, secret: bytes, name: str = "") -> Channel:
    """Join the driver whose address is in a store, as soon as there is one that answers.

    Args:
        store: Which outlives drivers.
        key: Where in the store the address is.
        secret: The job's.
        name: Of a worker that joined by hand.

    Raises:
        RuntimeError: The store is gone.
    """
    while True:
        if store.check([key]):
            address = json.loads(store.get(key))
            with contextlib.suppress(ChannelError):  # it is the address of the one before
                return _greet(connect(address["host"], address["port"], secret), name)
        time.sleep(_LOOK_S)


def _dial_next(where: Outlive, secret: bytes, name: str) -> Channel:
    store = TCPStore(where.host, where.port, is_master=False, timeout=_STORE_ANSWERS)
    return dial(store, where.key, secret, name)


def _greet(channel: Channel, name: str, ticket: str = "") -> Channel:
    to_driver(channel).send(Hello(own_versions(), os.getpid(), name=name, ticket=ticket))
    return channel


def _begin(channel: Channel, name: str, *polite: signal.Signals, ticket: str = "") -> Worker:
    """Join; leave politely at the first of the ``polite`` signals, at once where nobody minds."""
    worker = Worker(_greet(channel, name, ticket))

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
