"""Contenders side by side: start their processes, let them run steps in turns, keep every sample."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from models import Case

HERE = Path(__file__).resolve().parent
_LEAD_S = 0.05
"""How far ahead the common start of a sample lies."""


class ContenderError(RuntimeError):
    """A contender's process ended; its standard error says why."""


@dataclass(frozen=True)
class Process:
    """How to start one process of a contender."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    """What to start it under, such as ``ip netns exec``."""
    checkout: Path = HERE.parent
    """Whose code it runs: this checkout's, or an older one's, to see what a change costs."""


class Contender:
    """The processes of one way to train; the first answers for the time, all for their share of the processor."""

    def __init__(self, name: str, processes: Sequence[Process], num_processes: int) -> None:
        self.name = name
        self.num_processes = num_processes
        """The processes that compute blocks, workers included."""
        self._processes = [_start(process) for process in processes]

    def await_start(self) -> None:
        """Wait until every process has imported what it needs."""
        self.pids = [pid for answer in self._answers() for pid in answer["pids"]]

    def build(self, case: Case, warmup: int) -> None:
        """Build a case's model and run some steps untimed."""
        self._tell({"case": asdict(case), "warmup": warmup})
        self._answers()

    def sample(self, steps: int, lead_s: float = _LEAD_S) -> dict[str, Any]:
        """Run ``steps`` steps; return wall seconds and processor seconds of one, and the loss."""
        self._tell({"at": time.monotonic() + lead_s, "steps": steps})
        answers = self._answers()
        wall_s = max(answer["end"] for answer in answers) - min(answer["start"] for answer in answers)
        losses = [answer["loss"] for answer in answers if answer["loss"] is not None]
        return {
            "wall_s": wall_s / steps,
            "cpu_s": sum(answer["cpu_s"] for answer in answers) / steps,
            "loss": losses[-1],
        }

    def norm(self) -> float:
        """Return the norm of the last step's gradients."""
        self._tell({"norm": True})
        return sum(answer["norm_power"] for answer in self._answers()) ** 0.5

    def ask(self, **command: Any) -> list[dict[str, Any]]:
        """Send any other command to every process; return the answers."""
        self._tell(command)
        return self._answers()

    def close(self, patience_s: float = 30) -> None:
        """End the processes; kill those that do not end by themselves in time."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _tell(self, command: dict[str, Any]) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ContenderError(f"a process of {self.name!r} ended (exit status {process.wait()})")
            answers.append(json.loads(line))
        return answers


def _start(process: Process) -> subprocess.Popen[str]:
    command = [*process.command, sys.executable, str(process.checkout / "benchmarks/contender.py"), process.kind]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(process.checkout), os.environ.get("PYTHONPATH")))),
        "PYTHONWARNINGS": "ignore",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    started = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None,
        text=True,
        env=environment,
        cwd=process.checkout / "benchmarks",  # workers, which are started as modules, look here first
    )
    assert started.stdin is not None
    started.stdin.write(json.dumps(process.settings) + "\n")
    started.stdin.flush()
    return started


def free_port() -> int:
    """Return a port that nobody listens on at present."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def interleave(contenders: Sequence[Contender], rounds: int, steps: int, **options: Any) -> dict[str, list[Any]]:
    """Let the contenders take turns, in another order each round; return every sample by name."""
    samples: dict[str, list[Any]] = {contender.name: [] for contender in contenders}
    order = random.Random(0)
    for _ in range(rounds):
        for contender in order.sample(contenders, len(contenders)):
            samples[contender.name].append(contender.sample(steps, **options))
    return samples


def middle(samples: Sequence[dict[str, Any]], key: str) -> float:
    """The median of one quantity."""
    return median(sample[key] for sample in samples)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align rows under a header; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
