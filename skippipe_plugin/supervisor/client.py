"""The driver's side of its supervisor: whether there is one, and the worker processes that it keeps."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Collection
from typing import Final, TypeVar

from ..engine.c10d import TCPStore
from ..engine.channel import ChannelError, connect
from ..engine.control.codec import Control, Received
from ..engine.control.line import Line
from ..engine.errors import SkipPipeError
from ..engine.handshake import Purpose
from ..sources import Door
from ..worker.processes import worker_environment
from .messages import (
    TO_SUPERVISED,
    TO_SUPERVISOR,
    AskStore,
    AskWorkers,
    Begin,
    CannotDo,
    ForgetEnded,
    KillWorker,
    Obeyed,
    StartWorkers,
    StoreAt,
    Workers,
)
from .supervisor import ADDRESS_VARIABLE, ATTEMPT_VARIABLE

_C = TypeVar("_C", bound=Control)
log = logging.getLogger(__name__)

_SAY_S: Final = 5.0
"""After how many seconds a wait says what it waits for."""
_ANSWER_S: Final = 60.0
"""How long the supervisor, which only starts and counts processes, may take to answer."""


def supervised() -> bool:
    """Whether this process was started by ``skippipe run``."""
    return ADDRESS_VARIABLE in os.environ


class SupervisedProcesses:
    """Worker processes of the supervisor's, by their tickets; they outlive this process.

    Args:
        key: Where in the store the workers find the driver's address.
    """

    def __init__(self, key: str) -> None:
        self.attempt = int(os.environ[ATTEMPT_VARIABLE])
        """How many drivers there were before this one."""
        self.secret = os.environ["SKIPPIPE_SECRET"]
        self.key = key
        host, port = os.environ[ADDRESS_VARIABLE].rsplit(":", 1)
        self._channel = connect(host, int(port), bytes.fromhex(self.secret), purpose=Purpose.ASK_SUPERVISOR)
        self._line = Line(self._channel, TO_SUPERVISOR, TO_SUPERVISED)
        self._line.send(Begin())
        self._answers: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="supervisor", daemon=True)
        self._reader.start()

    def store(self) -> tuple[str, TCPStore]:
        """Connect to the job's store; return its host too."""
        where = self._ask(AskStore(), StoreAt)
        return where.host, TCPStore(where.host, where.port, is_master=False)

    def start(self, count: int, door: Door) -> None:
        """Start ``count`` workers; they look the driver's address up."""
        environment, folder = worker_environment(door.secret), os.getcwd()  # noqa: PTH109 - it travels as text
        self._ask(StartWorkers(count, self.key, environment, folder), Obeyed)

    def running(self) -> list[str]:
        """Return the tickets, which are process ids, of those that are alive."""
        return [str(pid) for pid in self._ask(AskWorkers(), Workers).running]

    def num_starting(self, joined: Collection[str]) -> int:
        """Return how many are alive and not among the tickets that ``joined``."""
        return sum(ticket not in joined for ticket in self.running())

    def ended_early(self, joined: Collection[str]) -> dict[str, str]:
        """Return the exit status of those that ended without having joined."""
        ended = {str(pid): f"exit status {status}" for pid, status in self._ask(AskWorkers(), Workers).ended}
        return {ticket: how for ticket, how in ended.items() if ticket not in joined}

    def kill(self, ticket: str) -> None:
        """End one of them at once."""
        self._ask(KillWorker(int(ticket)), Obeyed)

    def reap(self) -> None:
        """Forget those that ended."""
        self._ask(ForgetEnded(), Obeyed)

    def stop(self) -> None:
        """Leave the workers to the supervisor."""
        self._closing = True
        self._channel.close()
        self._reader.join()

    def _ask(self, question: Control, expected: type[_C]) -> _C:
        name = type(question).__name__
        with self._lock:
            answer = self._answer_to(self._line.send(question), name)
        if isinstance(answer, CannotDo):
            raise SkipPipeError(f"the supervisor could not do {name!r}: {answer.reason}")
        if not isinstance(answer, expected):
            raise SkipPipeError(f"the supervisor answered {name!r} with {type(answer).__name__!r}")
        return answer

    def _answer_to(self, number: int, name: str) -> Control:
        begun_s, told = time.monotonic(), False
        while True:
            try:
                answer = self._answers.get(timeout=1.0)
            except queue.Empty:
                waited_s = time.monotonic() - begun_s
                if waited_s > _ANSWER_S:
                    raise SkipPipeError(f"the supervisor did not answer {name!r} within {_ANSWER_S:g} s") from None
                if waited_s > _SAY_S and not told:
                    log.warning("waiting for the supervisor's answer to %r", name)
                    told = True
                continue
            if answer.answers == number:  # others are to questions that were given up, as by Ctrl-C
                return answer.body

    def _read(self) -> None:
        with contextlib.suppress(ChannelError):
            while True:
                self._answers.put(self._line.receive())
        if not self._closing:
            sys.stderr.write("skippipe: the supervisor is gone, so this driver ends too\n")
            os._exit(1)
