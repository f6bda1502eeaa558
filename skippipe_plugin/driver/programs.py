"""The schedules that steps run by name, around the workers that are missing, and this rank's part of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..engine.program import compile_program
from ..schedule import Schedule, detour, validate


class Programs:
    """What steps run.

    Args:
        schedules: By name, with every worker there.
        rank: Whose part of them is compiled.
    """

    def __init__(self, schedules: Mapping[str, Schedule], rank: int) -> None:
        self._rank = rank
        self.whole = dict(schedules)
        """By name, as they are when no worker is missing."""
        self._missing: frozenset[int] = frozenset()
        self.schedules = dict(schedules)
        """By name, around workers that are missing."""
        self.compiled = {name: compile_program(schedule, rank) for name, schedule in schedules.items()}
        """By name: this rank's actions."""

    def use(self, name: str, schedule: Schedule) -> None:
        """Run another schedule under ``name``.

        Raises:
            ScheduleError: It cannot run, or a path would have no stage left.
        """
        validate(schedule)
        self._set(name, detour(schedule, self._missing))
        self.whole[name] = schedule

    def go_around(self, missing: Collection[int]) -> None:
        """Let paths avoid some ranks; none: undo it.

        Raises:
            ScheduleError: A path would have no stage left; nothing changes.
        """
        around = {name: detour(schedule, missing) for name, schedule in self.whole.items()}
        self._missing = frozenset(missing)
        for name, schedule in around.items():
            self._set(name, schedule)

    def _set(self, name: str, schedule: Schedule) -> None:
        self.schedules[name] = schedule
        self.compiled[name] = compile_program(schedule, self._rank)
