"""Kill processes of several trainings in turn; measure how long each commits nothing, and what it does again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
P = 4
"""Processes of ours: a driver and three workers."""
EVERY = 20
"""Steps between two checkpoints."""
_LIMIT_S = 120.0
_LOOK_S = 0.002
_SETTLED_STEPS = 5
_IDLE_S = 0.5
_MAX_RESTARTS = 1000

Entry = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to survive, and how its training is started."""

    name: str
    kind: str
    devices: int
    recovery: dict[str, Any] = field(default_factory=dict)
    checkout: Path = HERE.parent
    """Whose code it runs."""


WAYS = (
    Way("ours, warm spare", "ours", P, {"spares": 1}),
    Way("ours, routing around", "ours", P, {"spares": 0, "while_missing": "skip"}),
    Way("ours, respawned", "ours", P, {"spares": 0}),
    Way("torchrun and checkpoints", "restarted", 1),
)
"""The peer is the cheapest restart there is: one process that holds the whole model. Each process more has to import
the same again and to find the others, and no Lightning strategy survives the loss of a pipeline stage in place."""


def against(checkout: Path) -> tuple[Way, ...]:
    """Return the quick ways of this checkout, each beside the same one of another."""
    ours = WAYS[:2]
    return ours + tuple(replace(way, name=f"{way.name} (before)", checkout=checkout) for way in ours)


class RaceError(RuntimeError):
    """A training did not go on; its log says why."""


class Training:
    """One contender: its processes, its journal, and the gate that is open while it is its turn."""

    def __init__(self, way: Way, folder: Path) -> None:
        self.way = way
        self._journal, self._gate, self._log = (folder / name for name in ("journal", "gate", "log"))
        self._entries: list[Entry] = []
        self._position = 0
        folder.mkdir()
        self._journal.touch()
        settings = {
            "kind": way.kind,
            "devices": way.devices,
            "recovery": way.recovery,
            "every": EVERY,
            "folder": str(folder),
            "journal": str(self._journal),
            "gate": str(self._gate),
        }
        torchrun = (
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--max-restarts={_MAX_RESTARTS}",
            "--nproc-per-node",
        )
        launcher = (*torchrun, "1") if way.kind == "restarted" else ()
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environment["PYTHONPATH"] = str(way.checkout)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *launcher, str(way.checkout / "benchmarks/recovery_run.py"), json.dumps(settings)],
                env=os.environ | environment,
                cwd=way.checkout / "benchmarks",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_one(self, chance: random.Random) -> dict[str, float]:
        """Kill one process in the middle of a step; return what that cost."""
        for _ in range(chance.randrange(EVERY)):  # checkpoints must not be taken just before
            self._wait("commit")
        begin = self._wait("begin")
        step_s = self._step_s()
        time.sleep(chance.uniform(0.2, 0.6) * step_s)
        os.kill(self._victim(begin), signal.SIGKILL)
        killed_s = time.monotonic()
        self._look()
        committed = max(entry["step"] for entry in self._entries if entry["event"] == "commit")
        first = self._wait("commit", killed_s)
        regained = self._wait("commit", killed_s, lambda entry: bool(entry["step"] > committed))
        if self.way.kind == "ours":
            self._wait("recovered", killed_s)
        return {
            "next_commit_s": first["at_s"] - killed_s,
            "regained_s": regained["at_s"] - killed_s,
            "steps_lost": committed + 1 - first["step"],
            "step_s": step_s,
        }

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Open the gate, until everything is as before the kill again, spares included."""
        self._gate.touch()
        try:
            yield
            self.settle()
        finally:
            self._gate.unlink()

    def settle(self) -> None:
        """Wait until steps run as ever, and the spares have imported what they need."""
        for _ in range(_SETTLED_STEPS):
            begin = self._wait("begin")
        while self.way.recovery.get("spares") and not (begin["spares"] and _all_idle(begin["spares"])):
            begin = self._wait("begin")

    def close(self) -> None:
        """End all processes; torchrun gives those that it starts a session of their own."""
        for sign, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        self._look()
        starts = [entry["pid"] for entry in self._entries if entry["event"] == "start"]
        if self.way.kind == "restarted" and starts:  # the ones before are dead, and others may have their numbers
            with suppress(ProcessLookupError):
                os.kill(starts[-1], signal.SIGKILL)

    # ------------------------------------------------------------ the journal

    def _wait(self, event: str, since_s: float | None = None, matches: Callable[[Entry], bool] = bool) -> Entry:
        """Return the first entry of a kind since a time: from now on, if none is given."""
        since_s = time.monotonic() if since_s is None else since_s
        deadline = time.monotonic() + _LIMIT_S
        seen = 0
        while True:
            self._look()
            for entry in self._entries[seen:]:
                if entry["event"] == event and entry["at_s"] > since_s and matches(entry):
                    return entry
            seen = len(self._entries)
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RaceError(f"{self.way.name}: no {event!r} in {_LIMIT_S:g} s\n{self._log.read_text()[-3000:]}")
            time.sleep(_LOOK_S)

    def _look(self) -> None:
        with self._journal.open() as file:
            file.seek(self._position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                self._position += len(line)
                self._entries.append(json.loads(line))

    def _step_s(self) -> float:
        ends = [entry["at_s"] for entry in self._entries if entry["event"] == "commit"][-_SETTLED_STEPS:]
        return median(after - before for before, after in pairwise(ends))

    def _victim(self, begin: Entry) -> int:
        if self.way.kind == "ours":
            return int(begin["workers"]["2"])  # the middle one of three
        return int([entry for entry in self._entries if entry["event"] == "start"][-1]["pid"])


def _all_idle(pids: Sequence[int]) -> bool:
    """Tell whether processes use no processor for a moment."""
    before = [_cpu_ticks(pid) for pid in pids]
    time.sleep(_IDLE_S)
    return all(after - ticks <= 2 for ticks, after in zip(before, map(_cpu_ticks, pids), strict=True))


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def race(rounds: int, ways: Sequence[Way] = WAYS) -> dict[str, list[dict[str, float]]]:
    """Let the ways take turns, in another order each round; return every kill by name."""
    order = random.Random(0)
    samples: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainings = []
        for number, way in enumerate(ways):
            training = Training(way, Path(folder, str(number)))
            stack.callback(training.close)
            trainings.append(training)
            with training.turn():
                pass
        for _ in range(rounds):
            for training in order.sample(trainings, len(trainings)):
                with training.turn():
                    training.settle()
                    samples[training.way.name].append(training.kill_one(order))
    return samples
