"""Workers that are tasks of SLURM job arrays: one array each time that the driver asks for workers.

Speaks to SLURM by its commands (``sbatch``, ``squeue``, ``scancel``), whose output is documented.
A lost task is not requeued, since SLURM holds such tasks back for two minutes: the driver asks for another one at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..engine.errors import SkipPipeError
from .addresses import own_address
from .interface import Door

log = logging.getLogger(__name__)

_COMMANDS: Final = ("sbatch", "squeue", "scancel")
_LOOKS_EVERY_S: Final = 1.0
_ANSWERS_S: Final = 30.0
"""A controller that is busy, or away, answers no sooner; the commands try for themselves."""
_PENDING_S: Final = 5.0
"""After how long it is said what tasks wait for."""
_END_S: Final = 10.0
"""How long workers that have been told to leave may take."""
_ON_THEIR_WAY: Final = frozenset(
    {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING"}
)
_FORM: Final = "%i|%T|%r|%N"
"""Of a line of ``squeue``: array job and index, state, why it is in it, node."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task of an array as ``squeue`` shows it."""

    state: str
    reason: str
    node: str

    @property
    def is_over(self) -> bool:
        """Whether no worker will come of it any more."""
        return self.state not in _ON_THEIR_WAY

    def __str__(self) -> str:
        where = f" on {self.node}" if self.node else ""
        why = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"SLURM says {self.state}{where}{why}"


def read_tasks(text: str) -> dict[str, Task]:
    """Return tasks by array job and index, from what ``squeue --array --format='%i|%T|%r|%N'`` has printed.

    >>> read_tasks("12_0|RUNNING|None|n1\\n12_1|NODE_FAIL|NodeDown|n2\\n")["12_1"].is_over
    True
    """
    lines = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return {name.strip(): Task(state.strip(), reason.strip(), node.strip()) for name, state, reason, node in lines}


def script(door: Door, python: str) -> str:
    """Return what a task runs; its ticket is its array job and index."""
    command = shlex.join(door.command("", python)[:-1])
    return f'#!/bin/sh\nexec {command} "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"\n'


class SlurmSource:
    """Submits job arrays, and asks the queue what has become of their tasks.

    Args:
        options: Of ``sbatch``, for what a worker takes: ``("--gpus-per-task=1", "--time=12:00:00")``. The variables
            that ``sbatch`` reads by itself (``SBATCH_ACCOUNT``, ``SBATCH_PARTITION``, ...) count too.
        python: The interpreter, where the nodes have another one.

    Example:
        >>> from functools import partial
        >>> from skippipe_plugin.strategies import NetworkConfig
        >>> network = NetworkConfig(workers=partial(SlurmSource, options=("--partition=gpu", "--gpus-per-task=1")))
    """

    def __init__(self, *, options: Sequence[str] = (), python: str = sys.executable) -> None:
        self._options = tuple(options)
        self._python = python
        self._lock = threading.Lock()
        self._known: dict[str, Task] = {}
        """By ticket, of those that were not taken back: what the queue said last."""
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Tickets of tasks to cancel; None to end."""
        self._told: set[str] = set()
        self._watcher: threading.Thread | None = None

    def open(self) -> tuple[str, int]:
        """Return this host's own address.

        Raises:
            SkipPipeError: SLURM's commands are not here, or this host's name has no address.
        """
        missing = [each for each in _COMMANDS if shutil.which(each) is None]
        if missing:
            raise SkipPipeError(
                f"workers='slurm': this host has no {missing[0]}; start the driver on a login node or inside of a job"
            )
        address = own_address("slurm")
        self._watcher = threading.Thread(target=self._watch, name="slurm", daemon=True)
        self._watcher.start()
        return address, 0

    def give(self, count: int, door: Door) -> Sequence[str]:
        """Submit an array of ``count`` tasks.

        Raises:
            SkipPipeError: SLURM refuses it.
        """
        command = ["sbatch", "--parsable", f"--array=0-{count - 1}", "--job-name=skippipe", "--no-requeue"]
        said = _run([*command, "--export=ALL", *self._options], script(door, self._python), door.environment())
        if said.returncode:
            raise SkipPipeError(f"workers='slurm': sbatch refuses a job array of workers: {said.stderr.strip()}")
        job = said.stdout.strip().partition(";")[0]  # behind it the cluster, where there are several
        tickets = [f"{job}_{index}" for index in range(count)]
        with self._lock:
            self._known.update(dict.fromkeys(tickets, Task("PENDING", "", "")))
        return tickets

    def gone(self) -> Mapping[str, str]:
        """Return the tasks that are over, or that the queue knows no more."""
        with self._lock:
            return {ticket: str(task) for ticket, task in self._known.items() if task.is_over}

    def take_back(self, ticket: str) -> None:
        """Cancel a task, soon: nobody waits for SLURM."""
        with self._lock:
            self._known.pop(ticket, None)
        self._orders.put(ticket)

    def close(self) -> None:
        """Cancel what has not started; wait for the others, which were told to leave, and cancel those that do not."""
        if self._watcher is None:
            return
        self._orders.put(None)
        self._watcher.join()
        self._watcher = None
        _cancel([each for each, task in self._left().items() if task.state == "PENDING"])
        deadline = time.monotonic() + _END_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
            self._look()
        _cancel(list(left))

    # ---------------------------------------------------------------- queue

    def _left(self) -> dict[str, Task]:
        with self._lock:
            return {ticket: task for ticket, task in self._known.items() if not task.is_over}

    def _watch(self) -> None:
        pending_s = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                ticket = self._orders.get(timeout=_LOOKS_EVERY_S)
                if ticket is None:
                    return
                _cancel([ticket])
                continue
            self._look()
            waiting = {ticket: task for ticket, task in self._left().items() if task.state == "PENDING"}
            if not waiting:
                pending_s = time.monotonic()
            elif time.monotonic() - pending_s > _PENDING_S:
                self._tell(waiting)

    def _look(self) -> None:
        """Ask the queue about every task that is not over."""
        left = self._left()
        if not left:
            return
        jobs = ",".join(dict.fromkeys(ticket.partition("_")[0] for ticket in left))
        command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FORM}", f"--jobs={jobs}"]
        said = _run(command)
        found = read_tasks(said.stdout)
        if said.returncode and "Invalid job id" not in said.stderr:
            self._say_once(f"the queue does not answer: {said.stderr.strip()}")
            return
        with self._lock:
            for ticket in left.keys() & self._known.keys():
                self._known[ticket] = found.get(ticket, Task("UNKNOWN", "its queue has forgotten the task", ""))

    def _tell(self, waiting: Mapping[str, Task]) -> None:
        by_reason: dict[str, list[str]] = {}
        for ticket, task in waiting.items():
            by_reason.setdefault(task.reason, []).append(ticket)
        for reason, tickets in by_reason.items():
            if reason not in ("", "None"):
                self._say_once(f"workers {', '.join(tickets)} wait in the queue: {reason}")

    def _say_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            log.warning("workers='slurm': %s", what)


def _cancel(tickets: Sequence[str]) -> None:
    if tickets:
        _run(["scancel", *tickets])  # of one that is over it says so, and that is all


def _run(
    command: Sequence[str], given: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands, without what the job around this process has set for itself."""
    own = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")}
    try:
        return subprocess.run(
            command,
            input=given,
            env=own | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=_ANSWERS_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
