"""The worker process: hold stages, obey control messages."""

from .processes import DriverProcesses, WorkerProcesses, end_with_parent
from .service import DriverGone, Worker

__all__ = ["DriverGone", "DriverProcesses", "Worker", "WorkerProcesses", "end_with_parent"]
