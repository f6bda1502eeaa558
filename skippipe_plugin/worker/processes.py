"""Worker processes on the driver's own host: start them, watch for an early end, end them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from typing import Final

_POLITE_S: Final = 5.0


class WorkerProcesses:
    """The processes one driver started. They also end by themselves when the driver is gone, however it went."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, count: int, *, host: str, port: int, secret: str) -> None:
        """Start ``count`` workers that join ``host:port``."""
        environment = os.environ | {"SKIPPIPE_SECRET": secret, "OMP_NUM_THREADS": "1"}
        # What the worker imports must be what the driver imported, also when that is not installed.
        environment["PYTHONPATH"] = os.pathsep.join(_import_paths())
        command = [sys.executable, "-m", "skippipe_plugin.worker", f"{host}:{port}"]
        self._processes += [
            subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) for _ in range(count)
        ]

    def num_starting(self, joined: Collection[int]) -> int:
        """Return how many are alive and not among the pids that ``joined``."""
        return sum(process.poll() is None and process.pid not in joined for process in self._processes)

    def ended_early(self, joined: Collection[int]) -> dict[int, int]:
        """Return pid and exit status of those that ended without having joined."""
        ended = [process for process in self._processes if process.poll() is not None and process.pid not in joined]
        return {process.pid: process.returncode for process in ended}

    def reap(self) -> None:
        """Forget those that served and ended, and those that never came."""
        self._processes = [process for process in self._processes if process.poll() is None]

    def stop(self) -> None:
        """Wait for the workers that were told to leave, end those that do not, and reap all."""
        deadline = time.monotonic() + _POLITE_S
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()


def _import_paths() -> Sequence[str]:
    return [path or os.getcwd() for path in sys.path]  # noqa: PTH109 - sys.path holds strings
