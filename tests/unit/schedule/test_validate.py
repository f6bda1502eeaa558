"""The validator accepts what can run, and rejects each way in which a schedule can be wrong."""

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    FULL_SCHEDULES,
    Action,
    Path,
    Schedule,
    ScheduleError,
    Visit,
    dependencies,
    full_schedule,
    in_order_links,
    peak_activations,
    simulate,
    topological_order,
    validate,
)
from skippipe_plugin.schedule.cost import CostModel

quick = settings(derandomize=True, deadline=None, max_examples=60)
counts = st.integers(1, 5)
full_schedules = st.builds(
    lambda name, stages, microbatches, replicas, drivers, driver_stage, backward: full_schedule(
        name,
        num_stages=stages,
        num_microbatches=microbatches,
        replicas=replicas,
        drivers=drivers,
        driver_stage=driver_stage,
        backward=backward,
    ),
    st.sampled_from(sorted(FULL_SCHEDULES)),
    counts,
    counts,
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)


def schedule_of(*orders: str, path: str = "0: 1@1 2@2", **changes) -> Schedule:
    parsed = tuple(tuple(map(Action.parse, order.split())) for order in orders)
    num_microbatches = 1 + max(action.microbatch for order in parsed for action in order)
    schedule = Schedule(((0,), (1,), (2,)), (Path.parse(path),) * num_microbatches, parsed)
    return replace(schedule, **changes)


@pytest.mark.parametrize("name", FULL_SCHEDULES)
def test_generated_schedules_are_valid(name):
    grid = product((1, 2, 3, 5, 8), (1, 2, 3, 8), (1, 2, 7, 16), (1, 2), (False, True))
    for stages, replicas, microbatches, drivers, driver_stage in grid:
        if stages * replicas * microbatches <= 256:
            validate(
                full_schedule(
                    name,
                    num_stages=stages,
                    num_microbatches=microbatches,
                    replicas=replicas,
                    drivers=drivers,
                    driver_stage=driver_stage,
                )
            )


@pytest.mark.parametrize("name", FULL_SCHEDULES)
def test_the_largest_schedule_of_the_grid_is_valid(name):
    validate(full_schedule(name, num_stages=8, num_microbatches=16, replicas=8, drivers=2))


@quick
@given(full_schedules)
def test_order_of_all_actions_respects_ranks_and_inputs(schedule):
    validate(schedule)
    place = {action: at for at, action in enumerate(topological_order(schedule))}
    assert len(place) == sum(map(len, schedule.orders))
    for order in schedule.orders:
        assert sorted(order, key=place.__getitem__) == list(order)
    for action, inputs in dependencies(schedule).items():
        assert all(place[needed] < place[action] for needed in inputs)


@quick
@given(full_schedules, st.integers(0, 10**6))
def test_mutations_are_rejected(schedule, seed):
    chance = random.Random(seed)
    rank = chance.choice([rank for rank, order in enumerate(schedule.orders) if order])
    order = list(schedule.orders[rank])
    at = chance.randrange(len(order))
    action, other = order[at], (rank + 1) % schedule.num_ranks
    without, twice = [*order[:at], *order[at + 1 :]], [*order[: at + 1], *order[at:]]
    foreign = replace(action, microbatch=schedule.num_microbatches)
    moved = {rank: without, other: [*schedule.orders[other], action]}
    mutations = [{rank: without}, {rank: twice}, {rank: [*order, foreign]}, {rank: [*without, foreign]}, moved]
    for mutation in mutations:
        orders = tuple(tuple(mutation.get(r, o)) for r, o in enumerate(schedule.orders))
        with pytest.raises(ScheduleError):
            validate(replace(schedule, orders=orders))


@quick
@given(full_schedules, st.integers(0, 10**6))
def test_dependent_actions_swapped_on_a_rank_are_rejected(schedule, seed):
    pairs = [
        (rank, i, j)
        for rank, order in enumerate(schedule.orders)
        for i, first in enumerate(order)
        for j, second in enumerate(order)
        if i < j and first.microbatch == second.microbatch
    ]
    rank, i, j = random.Random(seed).choice(pairs)
    order = list(schedule.orders[rank])
    order[i], order[j] = order[j], order[i]
    orders = (*schedule.orders[:rank], tuple(order), *schedule.orders[rank + 1 :])
    with pytest.raises(ScheduleError, match="deadlock"):
        validate(replace(schedule, orders=orders))


@quick
@given(full_schedules, st.integers(0, 10**6))
def test_rewired_visits_are_rejected(schedule, seed):
    microbatch = random.Random(seed).randrange(schedule.num_microbatches)
    path = schedule.paths[microbatch]
    first = path.visits[0]
    elsewhere = Visit(first.stage, (first.rank + 1) % schedule.num_ranks)
    for visits in ((*path.visits, first), path.visits[1:], (elsewhere, *path.visits[1:])):
        if visits != path.visits:
            paths = (*schedule.paths[:microbatch], replace(path, visits=visits), *schedule.paths[microbatch + 1 :])
            with pytest.raises(ScheduleError):
                validate(replace(schedule, paths=paths))


GOOD = ("0F0 0L0 0B0", "1F0 1B0", "2F0 2B0")
IW = ("0F0 0L0 0B0", "1F0 1B0", "2F0 2I0 2W0")


@pytest.mark.parametrize("orders", [GOOD, IW])
def test_small_schedules_are_valid(orders):
    validate(schedule_of(*orders))


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (schedule_of(*GOOD, placement=((), (1,), (2,))), "no driver"),
        (schedule_of(*GOOD, placement=((1,), (1,), (2,))), "number the ranks so that drivers"),
        (schedule_of(*GOOD, placement=((0,), (1,), (3,))), "stage 2 is placed on rank 3, but only 3 ranks"),
        (schedule_of(*GOOD, placement=((0,), (1, 1), (2,))), "stage 1 is placed twice"),
        (schedule_of(*GOOD, path="1: 1@1 2@2"), "rank 1, which is no driver"),
        (schedule_of(*GOOD, path="0:"), "visits no stage"),
        (schedule_of(*GOOD, path="0: 1@1 3@2"), "visits stage 3; block stages are 1 to 2"),
        (schedule_of(*GOOD, path="0: 1@1 2@1"), "stage 2 on rank 1, which does not hold it"),
        (schedule_of(*GOOD, path="0: 1@1 1@1"), "visits a stage twice"),
        (schedule_of(*GOOD, path="0: 1@1"), r"rank 2 runs 2F0: the path of microbatch 0 \(0: 1@1\) does not visit"),
        (schedule_of(*GOOD, backward=False), "rank 0 runs 0B0: an evaluation schedule has no backward"),
        (schedule_of("0F0 0L0 0B0 2F0", "1F0 1B0", "2B0"), "rank 0 runs 2F0, but the path needs it on rank 2"),
        (schedule_of("0F0 0L0 0B0", "1F0 1F0 1B0", "2F0 2B0"), "rank 1 runs 1F0 twice"),
        (schedule_of("0F0 0L0 0B0", "1F0", "2F0 2B0"), "rank 1 never runs 1B0"),
        (schedule_of("0F0 0L0 0B0", "1F0 1B0", "2F0 2I0"), "rank 2 never runs 2W0"),
        (schedule_of("0F0 0L0 0B0", "1F0 1B0", "2F0 2W0"), "rank 2 never runs 2I0"),
        (schedule_of("0F0 0L0 0B0", "1F0 1B0", "2F0 2B0 2W0"), "not B with a half"),
        (schedule_of("0F0 0L0 0I0", "1F0 1B0", "2F0 2B0"), "backward of stage 0 is not split"),
        (schedule_of("0F0 0L0 0B0", "1F0 1L0 1B0", "2F0 2B0"), "only the driver's stage 0 has a loss"),
        (schedule_of("0F0 0L0 0B0", "1F0 1B0", "2F0 2W0 2I0"), "deadlock: rank 2 waits at 2W0 for 2I0 of rank 2"),
    ],
)
def test_the_message_names_what_is_wrong(schedule, reason):
    with pytest.raises(ScheduleError, match=reason):
        validate(schedule)


def crossed() -> Schedule:
    """Two microbatches that visit two stages in opposite orders, each worker waiting for the other."""
    schedule = schedule_of("0F0 0F1 0L0 0L1 0B0 0B1", "1F1 1F0 1B0 1B1", "2F0 2F1 2B0 2B1")
    return replace(schedule, paths=(Path.parse("0: 1@1 2@2"), Path.parse("0: 2@2 1@1")))


def test_a_deadlock_is_described_as_a_circle():
    reason = "deadlock: rank 2 waits at 2F0 for 1F0 of rank 1; rank 1 waits at 1F1 for 2F1 of rank 2; order"
    for judge in (validate, lambda schedule: simulate(schedule, CostModel.uniform(2, 3))):
        with pytest.raises(ScheduleError, match=reason):
            judge(crossed())


def test_the_simulator_names_missing_and_surplus_actions():
    cost = CostModel.uniform(2, 3)
    with pytest.raises(ScheduleError, match="waits at 2F0 for 1F0 of rank 1, which never runs it"):
        simulate(schedule_of("0F0 0L0 0B0", "", "2F0 2B0"), cost)
    with pytest.raises(ScheduleError, match="rank 1 runs 1F0 twice"):
        simulate(schedule_of("0F0 0L0 0B0", "1F0 1F0 1B0", "2F0 2B0"), cost)


def test_memory_caps():
    schedule = full_schedule("gpipe", num_stages=2, num_microbatches=3)
    assert peak_activations(schedule) == (3, 3, 3)
    validate(schedule, memory_caps=(3, 3, 3))
    with pytest.raises(ScheduleError, match=r"rank 1 holds more than its cap of 2 activations at 1F2 \(3 at most\)"):
        validate(schedule, memory_caps=(3, 2, 3))
    with pytest.raises(ScheduleError, match="2 memory caps for 3 ranks"):
        validate(schedule, memory_caps=(3, 3))


def test_a_split_backward_holds_its_activation_until_the_weight_half():
    late = schedule_of("0F0 0F1 0L0 0L1 0B0 0B1", "1F0 1F1 1B0 1B1", "2F0 2I0 2F1 2I1 2W0 2W1")
    assert peak_activations(late) == (2, 2, 2)


def test_evaluation_holds_one_activation_per_worker():
    schedule = full_schedule("gpipe", num_stages=3, num_microbatches=5, backward=False)
    assert peak_activations(schedule) == (5, 1, 1, 1)


def test_links_out_of_send_order_are_told():
    assert all(in_order_links(full_schedule("gpipe", num_stages=3, num_microbatches=4)).values())
    one = full_schedule("1f1b", num_stages=1, num_microbatches=3)
    assert in_order_links(one) == {(0, 1): False, (1, 0): True}  # 0F1 leaves before 0L0, but 1B0 runs before 1F1
