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
from typing import Any, Final

from ..engine.c10d import TCPStore
from ..engine.channel import ChannelError, Message, connect
from ..engine.errors import SkipPipeError
from ..engine.handshake import Purpose
from ..sources import Door
from ..worker.processes import worker_environment
from .supervisor import ADDRESS_VARIABLE, ATTEMPT_VARIABLE

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
        self._channel.send("hello")
        self._answers: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="supervisor", daemon=True)
        self._reader.start()

    def store(self) -> tuple[str, TCPStore]:
        """Connect to the job's store; return its host too."""
        where = self._ask("store")
        return where["host"], TCPStore(where["host"], where["port"], is_master=False)

    def start(self, count: int, door: Door) -> None:
        """Start ``count`` workers; they look the driver's address up."""
        environment, folder = worker_environment(door.secret), os.getcwd()  # noqa: PTH109 - it travels as text
        self._ask("start", count=count, arguments=[self.key], environment=environment, folder=folder)

    def running(self) -> list[str]:
        """Return the tickets, which are process ids, of those that are alive."""
        return [str(pid) for pid in self._ask("status")["running"]]

    def num_starting(self, joined: Collection[str]) -> int:
        """Return how many are alive and not among the tickets that ``joined``."""
        return sum(ticket not in joined for ticket in self.running())

    def ended_early(self, joined: Collection[str]) -> dict[str, str]:
        """Return the exit status of those that ended without having joined."""
        ended = {str(pid): f"exit status {status}" for pid, status in self._ask("status")["ended"]}
        return {ticket: how for ticket, how in ended.items() if ticket not in joined}

    def kill(self, ticket: str) -> None:
        """End one of them at once."""
        self._ask("kill", pid=int(ticket))

    def reap(self) -> None:
        """Forget those that ended."""
        self._ask("reap")

    def stop(self) -> None:
        """Leave the workers to the supervisor."""
        self._closing = True
        self._channel.close()
        self._reader.join()

    def _ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        with self._lock:
            number, begun_s, told = self._channel.send(kind, fields), time.monotonic(), False
            while True:
                try:
                    answer = self._answers.get(timeout=1.0)
                except queue.Empty:
                    waited_s = time.monotonic() - begun_s
                    if waited_s > _ANSWER_S:
                        raise SkipPipeError(f"the supervisor did not answer {kind!r} within {_ANSWER_S:g} s") from None
                    if waited_s > _SAY_S and not told:
                        log.warning("waiting for the supervisor's answer to %r", kind)
                        told = True
                    continue
                if answer.answers == number:  # others are to questions that were given up, as by Ctrl-C
                    break
        if answer.kind == "failed":
            raise SkipPipeError(f"the supervisor could not do {kind!r}: {answer.fields['reason']}")
        return dict(answer.fields)

    def _read(self) -> None:
        with contextlib.suppress(ChannelError):
            while True:
                self._answers.put(self._channel.receive())
        if not self._closing:
            sys.stderr.write("skippipe: the supervisor is gone, so this driver ends too\n")
            os._exit(1)
