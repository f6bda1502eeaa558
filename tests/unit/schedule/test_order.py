"""The list scheduler orders any paths without a deadlock, within its caps, and near the bound."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    CostModel,
    NetworkCost,
    Path,
    ScheduleError,
    Visit,
    list_schedule,
    lower_bound_s,
    peak_activations,
    simulate,
    validate,
)

quick = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def routes(draw):
    """A placement with replicas, stages on drivers and holes that no path visits; paths in any order of stages."""
    num_drivers, num_ranks = draw(st.integers(1, 2)), draw(st.integers(3, 7))
    holders = st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=3, unique=True).map(tuple)
    stages = draw(st.lists(holders, min_size=1, max_size=5))
    placement = [tuple(range(num_drivers)), *stages]
    paths = []
    for _ in range(draw(st.integers(1, 10))):
        length = draw(st.integers(1, len(stages)))
        visited = draw(st.permutations(range(1, len(placement))))[:length]
        visits = tuple(Visit(stage, draw(st.sampled_from(placement[stage]))) for stage in visited)
        paths.append(Path(draw(st.integers(0, num_drivers - 1)), visits))
    return placement, paths


def rotated(num_workers: int, visits: int, num_microbatches: int) -> tuple[list[list[int]], list[Path]]:
    """Paths over some of the workers, each starting one further than the last: every worker is equally often first."""
    stages = [[1 + (m + i) % num_workers for i in range(visits)] for m in range(num_microbatches)]
    paths = [Path(0, tuple(Visit(stage, stage) for stage in path)) for path in stages]
    return [[rank] for rank in range(num_workers + 1)], paths


@quick
@given(routes(), st.sampled_from([None, "position"]), st.none() | st.integers(1, 4), st.booleans())
def test_any_paths_get_a_valid_order(routes, caps, in_flight, backward):
    placement, paths = routes
    schedule = list_schedule(
        placement, paths, activation_caps=caps, driver_in_flight=in_flight, backward=backward, name="any"
    )
    validate(schedule)
    assert (list(schedule.placement), list(schedule.paths), schedule.name) == (placement, paths, "any")
    assert schedule.backward is backward


@quick
@given(routes(), st.integers(0, 3), st.booleans())
def test_caps_by_rank_are_kept(routes, spare, backward):
    placement, paths = routes
    caps = [peak + spare for peak in peak_activations(list_schedule(placement, paths, driver_in_flight=1))]
    schedule = list_schedule(placement, paths, activation_caps=caps, backward=backward)
    validate(schedule, memory_caps=caps)


def test_the_tightest_cap_that_one_microbatch_needs_is_enough():
    """Reordered paths under caps of 1 lock up in every greedy order that admits two at once."""
    placement, paths = rotated(5, 3, 12)
    schedule = list_schedule(placement, paths, activation_caps=[12, 1, 1, 1, 1, 1])
    assert peak_activations(schedule)[1:] == (1, 1, 1, 1, 1)


def test_the_driver_admits_no_more_than_it_may():
    placement, paths = rotated(5, 3, 12)
    for limit in (1, 2, 5):
        assert peak_activations(list_schedule(placement, paths, driver_in_flight=limit))[0] == limit


def test_rotated_paths_reach_the_bound():
    """Each worker is equally often the first: no ramp is left (P = 6, 30 microbatches, one worker skipped: 72)."""
    placement, paths = rotated(5, 4, 30)
    schedule = list_schedule(placement, paths, driver_in_flight=12)
    cost = CostModel.uniform(5, 6)
    assert lower_bound_s(schedule, cost) == 72
    assert simulate(schedule, cost).makespan_s <= 72 * 1.03


def test_same_input_same_order():
    placement, paths = rotated(4, 3, 9)
    assert list_schedule(placement, paths) == list_schedule(placement, paths)


def test_a_cost_model_changes_the_order():
    placement = [[0], [1], [2], [3]]
    paths = [Path.parse("0: 1@1 3@3"), Path.parse("0: 2@2 3@3")]
    equal = CostModel.uniform(3, 4)
    latency = tuple(tuple(9.0 if (a, b) == (0, 1) else 0.0 for b in range(4)) for a in range(4))
    slow_first = CostModel(equal.compute, NetworkCost(latency, equal.network.bandwidth_Bps), 0)
    orders = [list_schedule(placement, paths, cost=cost).orders[3] for cost in (equal, slow_first)]
    assert [str(order[0]) for order in orders] == ["3F0", "3F1"]


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"driver_in_flight": 0}, ValueError, "driver_in_flight is 0"),
        ({"activation_caps": "positions"}, ValueError, "use 'position', one cap per rank, or None"),
        ({"activation_caps": [1]}, ValueError, "1 activation caps for 3 ranks"),
        ({"activation_caps": [1, 1, 0]}, ScheduleError, "one microbatch alone holds more"),
        ({"cost": CostModel.uniform(1, 3)}, ValueError, "covers 1 block stages and 3 ranks"),
    ],
)
def test_bad_arguments_are_named(arguments, error, reason):
    with pytest.raises(error, match=reason):
        list_schedule([[0], [1], [2]], [Path.parse("0: 1@1 2@2")], **arguments)


@pytest.mark.parametrize(
    ("placement", "path", "reason"),
    [
        ([], "0: 1@1", "no driver"),
        ([[0], [1]], "0: 2@1", "block stages are 1 to 1"),
        ([[0], [1]], "0: 1@0", "which does not hold it"),
        ([[0], []], "0: 1@1", "which does not hold it"),
    ],
)
def test_illegal_routes_are_named(placement, path, reason):
    with pytest.raises(ScheduleError, match=reason):
        list_schedule(placement, [Path.parse(path)])
