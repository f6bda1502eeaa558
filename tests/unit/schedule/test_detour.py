"""Schedules around missing ranks, and with their ends swapped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippipe_plugin.schedule import ScheduleError, detour, full_schedule, leaves_out, swap_ends, validate


@given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.data())
def test_nobody_visits_a_missing_rank(stages: int, count: int, replicas: int, backward: bool, data) -> None:
    schedule = full_schedule("1f1b", num_stages=stages, num_microbatches=count, replicas=replicas, backward=backward)
    workers = range(1, schedule.num_ranks)
    missing = data.draw(st.sets(st.sampled_from(workers), min_size=1, max_size=len(workers) - 1))
    gone = leaves_out(schedule.placement, missing)
    if len(gone) == stages:
        with pytest.raises(ScheduleError, match="no stage at all"):
            detour(schedule, missing)
        return
    around = detour(schedule, missing)
    validate(around)
    assert around.placement == schedule.placement
    for before, after in zip(schedule.paths, around.paths, strict=True):
        assert after.stages == tuple(stage for stage in before.stages if stage not in gone)
        assert not {visit.rank for visit in after.visits} & missing
    assert not any(around.orders[rank] for rank in missing)


def test_a_schedule_that_avoids_the_ranks_anyway_stays_as_it_is() -> None:
    schedule = full_schedule("gpipe", num_stages=2, num_microbatches=2)
    assert detour(schedule, {7}) is schedule
    assert detour(schedule, ()) is schedule


def test_replicas_share_the_work_of_a_lost_one() -> None:
    schedule = full_schedule("1f1b", num_stages=1, num_microbatches=6, replicas=3)
    ranks = [visit.rank for path in detour(schedule, {1}).paths for visit in path.visits]
    assert sorted(ranks) == [2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("stages", "swapped"), [(2, (2, 1)), (3, (2, 1, 3)), (4, (2, 1, 4, 3)), (6, (2, 1, 3, 4, 6, 5))]
)
def test_every_second_path_swaps_its_ends(stages: int, swapped: tuple[int, ...]) -> None:
    schedule = swap_ends(full_schedule("1f1b", num_stages=stages, num_microbatches=4))
    validate(schedule)
    straight = tuple(range(1, stages + 1))
    assert [path.stages for path in schedule.paths] == [straight, swapped, straight, swapped]


def test_one_stage_has_no_ends_to_swap() -> None:
    with pytest.raises(ScheduleError, match="cannot be swapped"):
        swap_ends(full_schedule("1f1b", num_stages=1, num_microbatches=2))
