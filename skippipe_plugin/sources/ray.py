"""Workers on the nodes of a Ray cluster, one per node where there are enough.

The driver's part: tickets, and a conversation with the process that is Ray's client (:mod:`.ray_seats`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, Final

from ..engine.errors import SkipPipeError
from .interface import Door

log = logging.getLogger(__name__)

_READY_S: Final = 60.0
_END_S: Final = 10.0


class RaySource:
    """Asks a Ray cluster for actors, each of which holds one worker.

    Args:
        address: The cluster's; by default what ``RAY_ADDRESS`` says, else the one that runs on this machine.
        resources: What a worker takes of its node, in Ray's names: ``{"CPU": 4, "GPU": 1}``. Default: one CPU.

    Example:
        >>> from functools import partial
        >>> from skippipe_plugin.strategies import NetworkConfig
        >>> network = NetworkConfig(workers=partial(RaySource, resources={"CPU": 4, "GPU": 1}))
    """

    def __init__(self, *, address: str | None = None, resources: Mapping[str, float] | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        self._address = address or os.environ.get("RAY_ADDRESS") or "auto"
        self._resources = dict(resources or {"CPU": 1})
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._given: set[str] = set()
        self._gone: dict[str, str] = {}
        self._failure = ""
        self._closing = False
        self._client: subprocess.Popen[str] | None = None
        self._ready: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None

    def open(self) -> tuple[str, int]:
        """Connect to the cluster; return this node's address in it.

        Raises:
            SkipPipeError: There is none.
        """
        command = [sys.executable, "-m", f"{__package__}.ray_seats", self._address, json.dumps(self._resources)]
        paths = os.pathsep.join(path or os.curdir for path in sys.path)
        self._client = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._client.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._client.stdout,), name="ray", daemon=True)
        self._reader.start()
        try:
            host, problem = self._ready.get(timeout=_READY_S)
        except queue.Empty:
            host, problem = "", f"the Ray cluster at address {self._address!r} did not answer within {_READY_S:g} s"
        if problem:
            self.close()
            raise SkipPipeError(
                f"workers='ray': {problem}; start the cluster (ray start --head, and ray start --address=... on the "
                "other machines), or say where it is: RAY_ADDRESS=HOST:PORT"
            )
        return host, 0

    def give(self, count: int, door: Door) -> Sequence[str]:
        """Ask for ``count`` more actors."""
        with self._lock:
            if self._failure:
                raise SkipPipeError(f"workers='ray': {self._failure}")
        tickets = [f"ray-{next(self._numbers)}" for _ in range(count)]
        workers = [
            {"ticket": each, "command": door.command(each)[1:], "environment": door.environment()} for each in tickets
        ]
        self._given.update(tickets)
        self._send(give=workers)
        return tickets

    def gone(self) -> Mapping[str, str]:
        """Return who is gone; everybody, when the head is."""
        with self._lock:
            return dict.fromkeys(self._given, self._failure) | self._gone if self._failure else dict(self._gone)

    def take_back(self, ticket: str) -> None:
        """Kill an actor, and its worker with it."""
        with self._lock:
            self._given.discard(ticket)
            self._gone.pop(ticket, None)
        self._send(take_back=ticket)

    def close(self) -> None:
        """Leave the cluster, which ends what is left of the actors."""
        self._closing = True
        if self._client is None or self._client.stdin is None:
            return
        with contextlib.suppress(OSError):  # it is gone, and what was still to be written too
            self._client.stdin.close()
        try:
            self._client.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._client.kill()
            self._client.wait()
        if self._reader is not None:
            self._reader.join(timeout=_END_S)

    # ------------------------------------------------------------------ the client

    def _send(self, **order: Any) -> None:
        assert self._client is not None, "open() comes first"
        assert self._client.stdin is not None
        try:
            self._client.stdin.write(json.dumps(order) + "\n")
            self._client.stdin.flush()
        except OSError:  # the reader knows more
            self._fail("the process that speaks to Ray is gone")

    def _read(self, answers: IO[str]) -> None:
        with answers:
            for line in answers:
                self._hear(json.loads(line))
        if not self._closing:
            self._fail("Ray has ended the process that speaks to it: this machine's Ray node is gone")

    def _hear(self, answer: Mapping[str, str]) -> None:
        if "ready" in answer:
            self._ready.put((answer["ready"], ""))
        elif "gone" in answer:
            with self._lock:
                if answer["gone"] in self._given:
                    self._gone[answer["gone"]] = answer["how"]
        elif "say" in answer:
            log.warning("%s", answer["say"])
        else:
            self._fail(answer["failed"])

    def _fail(self, why: str) -> None:
        with self._lock:
            self._failure = self._failure or why
        self._ready.put(("", why))
