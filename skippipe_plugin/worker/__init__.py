"""The worker process: hold stages, obey control messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..late import late_names

if TYPE_CHECKING:
    from .processes import DriverProcesses, WorkerProcesses, end_with_driver
    from .service import DriverGone, Worker

__all__ = ["DriverGone", "DriverProcesses", "Worker", "WorkerProcesses", "end_with_driver"]

_WHERE = {
    "DriverGone": "service",
    "DriverProcesses": "processes",
    "Worker": "service",
    "WorkerProcesses": "processes",
    "end_with_driver": "processes",
}
"""Imported when asked for: a worker process first sees to it that it ends with its parent, and then imports torch."""


__getattr__ = late_names(__name__, _WHERE)
