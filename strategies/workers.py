"""The workers of this driver process: started when there are too few, lent to one pipeline after another.

Workers belong to the *process*, not to a Trainer: the next ``fit`` takes them over. So this module keeps the one
registry there is. It is emptied when the interpreter ends; workers also end by themselves when their driver is gone.
"""

from __future__ import annotations

import atexit

from ..driver.links import Link
from ..driver.pool import WorkerPool
from ..worker import WorkerProcesses


class LocalWorkers:
    """Workers on this host."""

    def __init__(self, host: str, port: int) -> None:
        self.pool = WorkerPool(host, port)
        self._processes = WorkerProcesses()

    def prepare(self, count: int) -> None:
        """Start what is missing to have ``count`` idle workers soon; returns at once."""
        missing = count - self.pool.num_idle - self._processes.num_starting(self.pool.joined)
        if missing > 0:
            host, port = self.pool.address
            self._processes.start(missing, host=host, port=port, secret=self.pool.secret)

    def acquire(self, count: int) -> list[Link]:
        """Return ``count`` workers."""
        self._processes.reap()
        self.prepare(count)
        return self.pool.acquire(count, lambda: self._processes.ended_early(self.pool.joined))

    def close(self) -> None:
        """End all workers."""
        self.pool.close()
        self._processes.stop()


_registry: dict[tuple[str, int], LocalWorkers] = {}


def local_workers(host: str, port: int) -> LocalWorkers:
    """Return this process's workers that join at ``host:port``."""
    if not _registry:
        atexit.register(stop_workers)
    if (host, port) not in _registry:
        _registry[host, port] = LocalWorkers(host, port)
    return _registry[host, port]


def stop_workers() -> None:
    """End the worker processes that this process started; a later ``fit`` starts new ones."""
    while _registry:
        _, workers = _registry.popitem()
        workers.close()
