"""The schedules that steps run by name, around the workers that are missing, and this rank's part of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..engine.program import Plans, compile_program, embedded_in_order, most_in_flight
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
        self.schedules: dict[str, Schedule] = {}
        """By name, around workers that are missing."""
        self.compiled: dict[str, Plans] = {}
        """By name: this rank's actions."""
        self.embedded: dict[str, list[int]] = {}
        """By name: the microbatches that this rank embeds, in that order."""
        self.most_in_flight: dict[str, int] = {}
        """By name: of how many microbatches this rank keeps the embeddings at once."""
        for name, schedule in schedules.items():
            self._set(name, schedule)

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
        program = compile_program(schedule, self._rank)
        self.compiled[name] = Plans(program)
        self.embedded[name], self.most_in_flight[name] = embedded_in_order(program), most_in_flight(program)
