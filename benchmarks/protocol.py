"""What every process of a contender shares: the line protocol, the stopwatch, the memory of a process."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Console:
    """The line protocol of this process; what others print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def answer(self, **fields: Any) -> None:
        self._out.write(json.dumps(fields) + "\n")

    def commands(self) -> Iterator[dict[str, Any]]:
        for line in sys.stdin:
            yield json.loads(line)


def end_with_parent() -> None:
    """Let this process end when its parent is gone, in the middle of a step too."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def cpu_s(pid: int) -> float:
    """Processor seconds that all threads of any process on this host have used."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid returns


def memory_mb(pid: int) -> float:
    """The peak resident memory of a process since :func:`forget_peak`."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def forget_peak(pid: int) -> None:
    """Start measuring the peak resident memory anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Timer:
    """Measures as many steps as a command says, from the moment it says on."""

    def __init__(self, command: dict[str, Any], pids: list[int]) -> None:
        self._left, self._pids = command["steps"], pids
        time.sleep(max(0.0, command["at"] - time.monotonic()))
        self._cpu_s, self._start = sum(map(cpu_s, pids)), time.monotonic()

    def over(self) -> bool:
        """Count a step; say whether it was the last one."""
        self._left -= 1
        return self._left == 0

    def result(self, loss: float | None) -> dict[str, Any]:
        """Return what was measured, as an answer."""
        end = time.monotonic()
        cpu = sum(map(cpu_s, self._pids)) - self._cpu_s
        return {"start": self._start, "end": end, "cpu_s": cpu, "loss": loss}
