"""The worker process: hold stages, obey control messages."""

from .processes import WorkerProcesses
from .service import DriverGone, Worker

__all__ = ["DriverGone", "Worker", "WorkerProcesses"]
