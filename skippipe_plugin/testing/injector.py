"""Lets faults happen at their moments, and notes what it did."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal

from ..engine.phases import Moment, Phase, watching
from . import crew, sockets
from .faults import Connections, Cut, Delay, Fault, FillDisk, Kill, RefuseStart, Reset, Stop, Who

log = logging.getLogger(__name__)

_ENDS_S: Final = 5.0
"""How long a process that was killed may take to end."""
_COMES_S: Final = 30.0
"""How long a process that is to end before it joins may take to be there."""
_LOOK_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that came to its moment."""

    fault: Fault
    moment: Moment
    what: str
    """What was done, or why nothing was."""
    done: bool
    seconds: float
    """Since the injector was armed."""

    def __str__(self) -> str:
        return f"{self.seconds:7.2f} s, {self.moment}: {self.what}"


class _NobodyThereError(Exception):
    """The victim of a fault is not there."""


class Injector:
    """Injects faults into the runs of this process while it is entered; at its end everything is undone.

    Workers that were killed stay dead; those that are stopped go on, connections that are cut are repaired, and files
    may grow again. Faults reach workers on this host only, which this process has started.

    Args:
        faults: What happens, each once.
        seed: For victims that are to be drawn.

    Example:
        >>> from skippipe_plugin.testing import At, Injector, Kill, Phase
        >>> with Injector(Kill(At(Phase.TRAINING, step=3), who=2)) as injector:
        ...     pass  # trainer.fit(module, data)
        >>> injector.pending
        (Kill(at=At(phase=<Phase.TRAINING: 'training'>, nth=1, step=3, action='', delay_s=0.0), who=2),)
    """

    def __init__(self, *faults: Fault, seed: int = 0) -> None:
        self.report: list[Injected] = []
        """What was done, in order."""
        self.moments: list[Moment] = []
        """The phases that were reached, in order, without the actions of steps."""
        self._waiting: list[tuple[Fault, int]] = [(fault, fault.at.nth) for fault in faults]
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._timers: list[threading.Timer] = []
        self._over = threading.Event()
        self._undo: list[Callable[[], None]] = []
        self._refusals = 0
        self._unlimited: Callable[[], None] | None = None
        self._armed_s = 0.0
        self._watching = contextlib.ExitStack()

    @property
    def pending(self) -> tuple[Fault, ...]:
        """The faults whose moments have not come."""
        with self._lock:
            return tuple(fault for fault, _ in self._waiting)

    @property
    def num_done(self) -> int:
        """How many faults have happened."""
        return sum(injected.done for injected in self.report)

    def __enter__(self) -> Injector:
        self._armed_s = time.monotonic()
        self._watching.enter_context(watching(self._reached))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watching.close()
        self._over.set()
        for timer in self._timers:
            timer.cancel()
        for timer in self._timers:
            timer.join()
        for undo in list(self._undo):
            undo()
        self._lift_limit()

    # --------------------------------------------------------------- moments

    def _reached(self, moment: Moment) -> None:
        if not moment.action:
            self.moments.append(moment)
        for fault in self._due(moment):
            if fault.at.delay_s:
                self._later(fault.at.delay_s, functools.partial(self._inject, fault, moment))
            else:
                self._inject(fault, moment)
        if moment.phase in (Phase.ENDING, Phase.BETWEEN):
            self._lift_limit()
        if moment.phase is Phase.STARTING and self._refusals:
            self._refusals -= 1
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _due(self, moment: Moment) -> list[Fault]:
        due, waiting = list[Fault](), list[tuple[Fault, int]]()
        with self._lock:
            for fault, left in self._waiting:
                left -= fault.at.describes(moment)
                if left:
                    waiting.append((fault, left))
                else:
                    due.append(fault)
            self._waiting = waiting
        return due

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        timer = threading.Timer(delay_s, act)
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _inject(self, fault: Fault, moment: Moment) -> None:
        if self._over.is_set():
            return
        try:
            what, done = self._do(fault), True
        except _NobodyThereError as error:
            what, done = f"nothing, {error}", False
        injected = Injected(fault, moment, what, done, time.monotonic() - self._armed_s)
        self.report.append(injected)
        log.warning("injected: %s", injected)

    def _do(self, fault: Fault) -> str:
        match fault:
            case Kill():
                return self._kill(fault)
            case Stop():
                return self._stop(fault)
            case Cut():
                return self._cut(fault)
            case Reset():
                return self._reset(fault)
            case Delay():
                time.sleep(fault.for_s)
                return f"the driver is {fault.for_s:g} s late"
            case RefuseStart():
                return self._refuse(fault)
            case FillDisk():
                return self._fill_disk(fault)

    # ---------------------------------------------------------------- faults

    def _kill(self, fault: Kill) -> str:
        name, pid = self._victim(fault.who)
        _signal(pid, signal.SIGKILL)
        deadline = time.monotonic() + _ENDS_S
        while _is_running(pid) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return f"{name} is killed"

    def _stop(self, fault: Stop) -> str:
        name, pid = self._victim(fault.who)
        _signal(pid, signal.SIGSTOP)
        self._undo_after(fault.for_s, lambda: _resume(pid))
        return f"{name} is stopped{_for(fault.for_s)}"

    def _cut(self, fault: Cut) -> str:
        name, pairs = self._connections(fault.between, fault.connections)
        ends = [end for pair in pairs for end in pair]
        for end in ends:
            sockets.silence(end)

        def repair() -> None:
            for end in ends:
                sockets.unsilence(end)
                end.close()

        self._undo_after(fault.for_s, repair)
        return f"{len(pairs)} connections of {name} are cut{_for(fault.for_s)}"

    def _reset(self, fault: Reset) -> str:
        name, pairs = self._connections(fault.between, fault.connections)
        for pair in pairs:
            with contextlib.suppress(OSError):  # it ended meanwhile
                sockets.reset(pair[0])
            for end in pair:
                end.close()
        return f"{len(pairs)} connections of {name} are reset"

    def _refuse(self, fault: RefuseStart) -> str:
        if not fault.ends:
            self._refusals += fault.count
            return f"the next {fault.count} worker processes do not start"
        before = crew.starting()
        threading.Thread(target=self._end_early, args=(before, fault.count), daemon=True).start()
        return f"the next {fault.count} worker processes end before they join"

    def _end_early(self, before: set[int], count: int) -> None:
        deadline = time.monotonic() + _COMES_S
        while count and time.monotonic() < deadline and not self._over.is_set():
            for pid in list(crew.starting() - before)[:count]:
                before.add(pid)
                with contextlib.suppress(_NobodyThereError):
                    _signal(pid, signal.SIGKILL)
                count -= 1
            time.sleep(_LOOK_S)

    def _fill_disk(self, fault: FillDisk) -> str:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.num_bytes, hard))
        self._unlimited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if fault.for_s is not None:
            self._later(fault.for_s, self._lift_limit)
        return f"files cannot grow beyond {fault.num_bytes} bytes"

    def _lift_limit(self) -> None:
        unlimited, self._unlimited = self._unlimited, None
        if unlimited is not None:
            unlimited()

    # --------------------------------------------------------------- victims

    def _victim(self, who: Who) -> tuple[str, int]:
        if who == "spare":
            pid = self._one_of(sorted(crew.spares()), "there is no spare")
            return f"an idle worker (process {pid})", pid
        busy = crew.busy()
        rank = self._one_of(sorted(busy), "there is no worker") if who == "any" else int(who)
        if rank not in busy:
            raise _NobodyThereError(f"there is no worker of rank {rank} on this host")
        return f"worker rank {rank} (process {busy[rank]})", busy[rank]

    def _one_of(self, choices: Sequence[int], otherwise: str) -> int:
        if not choices:
            raise _NobodyThereError(otherwise)
        return self._random.choice(choices)

    def _connections(
        self, between: tuple[int, Who | Literal["all"]], which: Connections
    ) -> tuple[str, list[tuple[socket.socket, socket.socket]]]:
        rank, other = between
        busy = crew.busy()
        if other == "all":
            others = {each: pid for each, pid in busy.items() if each != rank}
        elif other == "spare":
            others = {-1: self._victim("spare")[1]}
        else:
            choices = sorted(busy.keys() - {rank})
            chosen = self._one_of(choices, "there is no worker") if other == "any" else other
            others = {each: pid for each in [chosen] if (pid := crew.pid_of(each)) is not None}
        first = crew.pid_of(rank)
        if first is None or not others:
            raise _NobodyThereError(f"ranks {rank} and {other} are not both on this host")
        pairs = [pair for pid in others.values() for pair in sockets.connections(first, pid)]
        chosen_pairs = list(_of_kind(pairs, which))
        if not chosen_pairs:
            raise _NobodyThereError(f"ranks {rank} and {other} are not connected")
        return f"ranks {rank} and {', '.join(map(str, others))}", chosen_pairs

    def _undo_after(self, seconds: float | None, undo: Callable[[], None]) -> None:
        """Undo once: after some seconds, or at the end."""

        def once() -> None:
            with self._lock:
                if once not in self._undo:
                    return
                self._undo.remove(once)
            undo()

        with self._lock:
            self._undo.append(once)
        if seconds is not None:
            self._later(seconds, once)


def _of_kind(
    pairs: Iterable[tuple[socket.socket, socket.socket]], which: Connections
) -> Iterable[tuple[socket.socket, socket.socket]]:
    control = crew.control_ports()
    for pair in pairs:
        is_control = not control.isdisjoint(sockets.port_of(pair[0]))
        if which == "all" or (which == "control") == is_control:
            yield pair
        else:
            for end in pair:
                end.close()


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError as error:
        raise _NobodyThereError(f"process {pid} has ended") from error


def _resume(pid: int) -> None:
    with contextlib.suppress(_NobodyThereError):
        _signal(pid, signal.SIGCONT)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _for(seconds: float | None) -> str:
    return "" if seconds is None else f" for {seconds:.2g} s"
