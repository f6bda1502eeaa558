"""What runs where and when: schedules as values, their validator, generators, cost model and simulator.

Pure Python without torch, processes or network; everything else of the package builds on this one.
"""

from skippipe_plugin.schedule.ir import (
    DRIVER_STAGE,
    Action,
    Message,
    Op,
    Path,
    Schedule,
    ScheduleError,
    Visit,
    dependencies,
    messages,
    rank_of,
)

__all__ = [
    "DRIVER_STAGE",
    "Action",
    "Message",
    "Op",
    "Path",
    "Schedule",
    "ScheduleError",
    "Visit",
    "dependencies",
    "messages",
    "rank_of",
]
