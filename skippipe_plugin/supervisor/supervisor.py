"""The supervisor: hosts the job's store, starts workers when the driver asks, starts the driver again when it is lost.

Death by a signal is a lost driver; any other end of the user's command ends everything with its exit status. The main
thread waits for the command; one thread answers the driver. Nothing outlives the supervisor: the driver gets a signal
from the kernel (Linux) and sees its channel end, workers see the end of their stdin.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..engine.c10d import host_store
from ..engine.channel import Channel, ChannelError, Message
from ..engine.control.codec import Control
from ..engine.control.handlers import Handlers
from ..engine.control.line import Line
from ..engine.errors import SkipPipeError
from ..engine.handout import fingerprint
from ..engine.handshake import Purpose
from ..engine.job_store import Address, JobState, JobStore
from ..engine.listener import Listener
from ..engine.secret import SECRET_FILE_VARIABLE, job_secret
from ..worker import WorkerProcesses
from ..worker.parent import death_with_parent
from .messages import (
    TO_SUPERVISED,
    TO_SUPERVISOR,
    AskStore,
    AskWorkers,
    CannotDo,
    ForgetEnded,
    KillWorker,
    Obeyed,
    StartWorkers,
    StoreAt,
    Workers,
)
from .standby import await_loss

log = logging.getLogger(__name__)

ADDRESS_VARIABLE: Final = "SKIPPIPE_SUPERVISOR"
ATTEMPT_VARIABLE: Final = "SKIPPIPE_ATTEMPT"
_LOOK_S: Final = 0.2
_TOLD_S: Final = 3.0
_SHELL: Final = 128
"""A shell (or a launcher) whose command died by a signal ends with this plus the signal's number."""
_FORWARDED: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a command is supervised."""

    max_restarts: int = 10
    """How often the command is started again after it died by a signal."""
    host: str = "127.0.0.1"
    """The address of the store and of the supervisor, as the driver and its workers reach it."""
    port: int = 0
    """The store's; 0 takes any free one."""
    standby_for: Address | None = None
    """The store of the supervisor whose job is taken over when its host is lost; None: the job begins here."""

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts} must be 0 or more")


def run(command: Sequence[str], options: RunOptions) -> int:
    """Run ``command`` until it ends other than by a signal, or too often by one; return its exit status."""
    supervisor = Supervisor(options)
    try:
        return supervisor.run(command)
    finally:
        supervisor.close()


class Supervisor:
    """One supervised job; call :meth:`close` when done."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options
        given = job_secret(None, create=options.standby_for is None)
        if given is None and options.standby_for is not None:
            raise ValueError(
                f"who stands by must know the job's secret: set {SECRET_FILE_VARIABLE} to a copy of the first host's"
            )
        self._may_be_joined = given is not None
        self._secret = given or secrets.token_hex(32)
        self._store = host_store(options.host, options.port)
        self._job = JobStore(self._store, options.host)
        self._job.begin(fingerprint(self._secret))
        self._listener = Listener(options.host, 0, bytes.fromhex(self._secret), purpose=Purpose.ASK_SUPERVISOR)
        self._workers = WorkerProcesses()
        self._driver: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._stopping = False
        self._closing = threading.Event()
        self._handlers = self._obey()
        self._desk = threading.Thread(target=self._serve, name="driver's requests", daemon=True)
        self._desk.start()

    def run(self, command: Sequence[str]) -> int:
        """See :func:`run`."""
        first = self._options.standby_for
        begun = JobState() if first is None else await_loss(first, self._job, fingerprint(self._secret))
        if isinstance(begun, int):
            return begun
        self._job.put(begun)
        if self._may_be_joined and not ipaddress.ip_address(self._listener.host).is_loopback:
            log.warning(
                "another host may stand by for this job: skippipe run --host ADDRESS --standby-for %s:%d -- COMMAND",
                *self._job.address,
            )
        status = self._attempts(command, begun.attempt)
        self._say_over(status)
        return status

    def _attempts(self, command: Sequence[str], first: int) -> int:
        for attempt in itertools.count(first):
            self._job.put(JobState(attempt))
            status, seconds = self._attempt(command, attempt)
            number = _signal_of(status)
            if number is None or self._stopping:
                break
            left = self._options.max_restarts - (attempt - first)
            log.warning(
                "the driver died by %s after %.0f s; %s", signal.Signals(number).name, seconds, self._what_now(left)
            )
            if left == 0:
                break
        return status if status >= 0 else _SHELL - status

    def _say_over(self, status: int) -> None:
        """Let those that stand by know that the job is not lost: wait until they have read it, but not for long."""
        self._job.end(status)
        deadline_s = time.monotonic() + _TOLD_S
        while self._job.num_told() < len(self._job.standbys()) and time.monotonic() < deadline_s:
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """End what is left of the job."""
        self._closing.set()
        # The driver has told its workers to leave; those of a driver that died wait for the next one. They end with
        # the thread that has started them.
        self._workers.stop(patience_s=0.0 if self._stopping else _LOOK_S)
        self._desk.join()
        self._listener.close()

    def _what_now(self, left: int) -> str:
        if left == 0:
            return f"it is not started again, because --max-restarts {self._options.max_restarts} is reached"
        return f"it is started again ({left - 1} more restarts are left)"

    def _attempt(self, command: Sequence[str], attempt: int) -> tuple[int, float]:
        environment = os.environ | {
            "SKIPPIPE_SECRET": self._secret,
            ADDRESS_VARIABLE: f"{self._listener.host}:{self._listener.port}",
            ATTEMPT_VARIABLE: str(attempt),
        }
        started_s = time.monotonic()
        previous = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            self._driver = subprocess.Popen(command, env=environment, preexec_fn=death_with_parent())
            return self._driver.wait(), time.monotonic() - started_s
        finally:
            if self._channel is not None:
                self._channel.close()  # children that the driver has forked may hold its other end open
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _: object) -> None:
        self._stopping = True
        # Ctrl-C in a terminal reaches the whole process group, the driver too, whatever the standard input is.
        if self._driver is not None and not (number == signal.SIGINT and _in_foreground()):
            self._driver.send_signal(number)

    # ------------------------------------------------------------- requests

    def _serve(self) -> None:
        """Answer drivers, one after the other."""
        while not self._closing.is_set():
            arrived = self._listener.accept(timeout_s=_LOOK_S)
            if arrived is not None:
                self._attend(*arrived)

    def _attend(self, channel: Channel, greeting: Message) -> None:
        self._channel = channel
        line = Line(channel, TO_SUPERVISED, TO_SUPERVISOR)
        try:
            TO_SUPERVISOR.decode(greeting)
            while True:
                line.send(answer_to(line.receive().body, self._handlers))
        except ChannelError:
            channel.close()

    def _obey(self) -> Handlers:
        handlers = Handlers("a supervisor that serves a driver")
        handlers.on(AskStore, lambda _: StoreAt(self._options.host, self._store.port))
        handlers.on(StartWorkers, self._start)
        handlers.on(AskWorkers, self._tell_workers)
        handlers.on(KillWorker, lambda command: self._workers.kill(command.pid))
        handlers.on(ForgetEnded, lambda _: self._workers.reap())
        return handlers

    def _start(self, wanted: StartWorkers) -> None:
        store = f"{self._options.host}:{self._store.port}"
        command = [sys.executable, "-m", "skippipe_plugin.worker.supervised", store, wanted.key]
        self._workers.start_bound(wanted.count, command, wanted.environment, wanted.folder)

    def _tell_workers(self, _: AskWorkers) -> Workers:
        return Workers(self._workers.running(), [*self._workers.ended_early(()).items()])


def answer_to(request: Control, handlers: Handlers) -> Control:
    """Do what a driver asks for; a failure is its own, and never the end of this desk."""
    try:
        return handlers.obey(request) or Obeyed()
    except Exception as error:
        return CannotDo(f"{error}" if isinstance(error, SkipPipeError) else repr(error))


def _in_foreground() -> bool:
    """Whether this process group is the one that its terminal, if it has one, sends Ctrl-C to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _signal_of(status: int) -> int | None:
    """Return the signal that ended a command; None when it ended by itself."""
    number = -status if status < 0 else status - _SHELL
    return number if number in set(signal.Signals) else None
