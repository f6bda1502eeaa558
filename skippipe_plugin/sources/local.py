"""Workers that the driver starts as processes on its own host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ..engine.errors import SkipPipeError
from ..worker import WorkerProcesses
from .interface import Door

HERE: Final = "127.0.0.1"


class LocalSource:
    """Starts processes of this host, which end with the driver; a ticket is a process id."""

    def __init__(self) -> None:
        self._processes = WorkerProcesses()

    def open(self) -> tuple[str, int]:
        """Return the address that nobody else reaches."""
        return HERE, 0

    def give(self, count: int, door: Door) -> Sequence[str]:
        """Start ``count`` processes, or none where the system refuses one of them."""
        before = set(self._processes.known())
        try:
            self._processes.start(count, host=door.host, port=door.port, secret=door.secret)
        except SkipPipeError:
            for pid in set(self._processes.running()) - before:
                self.take_back(str(pid))
            raise
        return [str(pid) for pid in self._processes.known() if pid not in before]

    def gone(self) -> Mapping[str, str]:
        """Return the exit status of those that ended."""
        return {str(pid): f"exit status {status}" for pid, status in self._processes.ended_early(()).items()}

    def take_back(self, ticket: str) -> None:
        """Kill a process, and forget it."""
        self._processes.kill(int(ticket))
        self._processes.forget(int(ticket))

    def close(self) -> None:
        """Wait for all to end, and end those that do not."""
        self._processes.stop()
