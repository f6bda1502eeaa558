"""``skippipe run``: a process that owns the store and the workers, so that the driver may die and be started again."""

from .client import SupervisedProcesses, supervised
from .supervisor import RunOptions, run

__all__ = ["RunOptions", "SupervisedProcesses", "run", "supervised"]
