"""Schedules that go around ranks that are not there."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from skippipe_plugin.schedule.full import gpipe
from skippipe_plugin.schedule.ir import Path, Schedule, ScheduleError, Visit
from skippipe_plugin.schedule.order import list_schedule


def detour(schedule: Schedule, missing: Collection[int]) -> Schedule:
    """Return ``schedule`` without the ranks in ``missing``: another replica takes over, or the stage is left out.

    Placement and ranks stay; the missing ranks have nothing to do. Replicas share what their lost one would have done.

    >>> from skippipe_plugin.schedule import full_schedule
    >>> schedule = full_schedule("1f1b", num_stages=3, num_microbatches=2)
    >>> [str(path) for path in detour(schedule, {2}).paths]
    ['0: 1@1 3@3', '0: 1@1 3@3']

    Raises:
        ScheduleError: A path has no stage left.
    """
    if not set(missing) & {visit.rank for path in schedule.paths for visit in path.visits}:
        return schedule
    paths = tuple(_around(schedule, number, frozenset(missing)) for number in range(schedule.num_microbatches))
    if not all(path.visits for path in paths):
        raise ScheduleError(f"without rank {', '.join(map(str, sorted(missing)))} a path visits no stage at all")
    if not schedule.backward or schedule.name == "gpipe":
        return replace(gpipe(schedule.placement, paths, backward=schedule.backward), name=schedule.name)
    in_flight = 2 * (schedule.num_ranks - len(missing))
    return list_schedule(schedule.placement, paths, driver_in_flight=in_flight, name=schedule.name)


def leaves_out(placement: Sequence[Sequence[int]], missing: Collection[int]) -> tuple[int, ...]:
    """Return the block stages that nobody holds when the ranks in ``missing`` are not there."""
    return tuple(stage for stage, ranks in enumerate(placement) if stage and set(ranks) <= set(missing))


def swap_ends(schedule: Schedule) -> Schedule:
    """Return ``schedule`` with the first two and the last two stages exchanged on every second path (CheckFree+).

    So the second stage learns to do the first one's work and the last but one the last one's, and the copy of a
    neighbour is a good replacement for a stage at an end.

    Raises:
        ScheduleError: There are fewer than two stages, or stages are left out already.
    """
    paths = tuple(_swapped(schedule, path) if number % 2 else path for number, path in enumerate(schedule.paths))
    in_flight = 2 * schedule.num_ranks
    return list_schedule(schedule.placement, paths, driver_in_flight=in_flight, name=schedule.name)


def _swapped(schedule: Schedule, path: Path) -> Path:
    visits = list(path.visits)
    if path.stages != tuple(range(1, schedule.num_stages + 1)) or len(visits) < 2:
        raise ScheduleError(f"the ends of path {str(path)!r} cannot be swapped: it must visit all stages in order")
    visits[:2] = reversed(visits[:2])
    if len(visits) > 3:  # with three stages the middle one has moved already
        visits[-2:] = reversed(visits[-2:])
    return Path(path.driver, tuple(visits))


def _around(schedule: Schedule, number: int, missing: frozenset[int]) -> Path:
    path = schedule.paths[number]
    visits = []
    for visit in path.visits:
        living = [rank for rank in schedule.placement[visit.stage] if rank not in missing]
        if visit.rank not in missing:
            visits.append(visit)
        elif living:
            visits.append(Visit(visit.stage, living[number % len(living)]))
    return Path(path.driver, tuple(visits))
