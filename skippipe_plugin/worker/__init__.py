"""The worker process: hold stages, obey control messages."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:  # Any: the module's own attributes
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
