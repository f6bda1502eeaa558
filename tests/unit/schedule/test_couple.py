"""Coupled ranks: what meets what, what is refused, and schedules of bundles turned into those of microbatches."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    CostModel,
    PathConstraints,
    PlanProblem,
    Schedule,
    ScheduleError,
    condense,
    condense_costs,
    expand,
    forward_only,
    full_schedule,
    meetings,
    plan,
    simulate,
    validate,
)


def coupled(name: str = "1f1b", size: int = 2, bundles: int = 3, stages: int = 2, **options) -> Schedule:
    return expand(full_schedule(name, num_stages=stages, num_microbatches=bundles, **options), size)


def run_in_lock_step(schedule: Schedule) -> None:
    """Play the orders alone: a meeting takes place when it comes next on all of its ranks."""
    orders, together = [list(order) for order in schedule.orders], meetings(schedule)
    while any(orders):
        heads = {rank: order[0] for rank, order in enumerate(orders) if order}
        groups = [together[head].ranks if head in together else (rank,) for rank, head in heads.items()]
        able = [
            ranks
            for ranks in groups
            if len(ranks) == 1 or all(heads.get(r) in together[heads[ranks[0]]].actions for r in ranks)
        ]
        assert able, "the ranks of a group wait for each other"
        for rank in able[0]:
            orders[rank].pop(0)


@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    size=st.integers(2, 4),
    bundles=st.integers(1, 4),
    stages=st.integers(1, 3),
    groups=st.integers(1, 2),
    drivers=st.integers(1, 2),
    driver_stage=st.booleans(),
)
def test_expanded_schedules_run(name, size, bundles, stages, groups, drivers, driver_stage) -> None:
    schedule = coupled(
        name, size, bundles, stages, replicas=groups, drivers=drivers, driver_stage=driver_stage and stages > 1
    )
    validate(schedule)
    validate(forward_only(schedule))
    assert schedule.num_microbatches == drivers * bundles * size
    assert all(len(ranks) == size for ranks in schedule.coupled)
    run_in_lock_step(schedule)
    assert expand(condense(schedule), size) == schedule
    assert Schedule.parse(str(schedule)) == Schedule.from_json(schedule.to_json()) == schedule


@given(skip=st.sampled_from([0.25, 0.5]), size=st.integers(2, 3), bundles=st.integers(1, 4))
def test_partial_plans_expand_too(skip: float, size: int, bundles: int) -> None:
    problem = PlanProblem(
        placement=((0,), (1,), (2,), (3,), (4,)),
        microbatches_per_driver=bundles,
        cost=CostModel.uniform(4, 5, latency_s=0.3),
        constraints=PathConstraints(skip_ratio=skip),
    )
    schedule = expand(plan(problem, max_iterations=200).schedule, size)
    validate(schedule)
    run_in_lock_step(schedule)


def test_partners_begin_and_end_together() -> None:
    """Rank 2 is twice as slow, and the link to rank 1 is: both wait for what the other waits for."""
    schedule = coupled("gpipe", bundles=1, stages=1, backward=False)
    cost = CostModel.uniform(1, 3)
    compute = replace(cost.compute, rank_factor=(1.0, 1.0, 2.0))
    network = replace(cost.network, latency_s=((0.0, 5.0, 0.0), (0.0,) * 3, (0.0,) * 3))
    timeline = simulate(schedule, replace(cost, compute=compute, network=network))
    events = {str(event.action): (event.start_s, event.end_s) for event in timeline.events}
    assert events["1F0"] == events["1F1"] == (5.0, 7.0)


def test_alone_they_would_not_wait() -> None:
    schedule = replace(coupled(bundles=4), coupled=())
    cost = CostModel.uniform(2, 5)
    assert simulate(schedule, cost).makespan_s <= simulate(coupled(bundles=4), cost).makespan_s


REFUSED = {
    "different orders": ("rank 2 = 1F1 1B1 1F3 1B3", "the coupled ranks 1 and 2 run stage 1 in different orders: 1B1"),
    "halves": ("rank 2 = 1F1 1F3 1I1 1W1 1B3", r"rank 2 runs 1I1: .* cannot be split; write B"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_meet_is_refused(case: str) -> None:
    line, message = REFUSED[case]
    text = str(coupled("gpipe", bundles=2, stages=1))
    assert "rank 2 = 1F1 1F3 1B1 1B3" in text
    with pytest.raises(ScheduleError, match=message):
        validate(Schedule.parse(text.replace("rank 2 = 1F1 1F3 1B1 1B3", line)))


def test_coupled_ranks_have_as_many_microbatches() -> None:
    schedule = replace(full_schedule("1f1b", num_stages=1, num_microbatches=3, replicas=2), coupled=((1, 2),))
    with pytest.raises(ScheduleError, match="the coupled ranks 1 and 2 run 4 and 2 actions of stage 1; give each as"):
        validate(schedule)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((1, 3), r"the ranks \(1, 3\) cannot be coupled: rank 3 holds the stages \(2,\)"),
        ((0, 1), "rank 0 holds the stages"),
        ((1,), "name two or more different ranks"),
        ((1, 1), "name two or more different ranks"),
    ],
)
def test_only_replicas_are_coupled(ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(replace(coupled(), coupled=(ranks,)))


def test_ranks_that_would_wait_for_each_other_are_refused() -> None:
    """Two stages on the same two ranks, each rank beginning with the other stage."""
    text = """
    schedule "crossed" evaluation
    stage 0 = 0
    stage 1 = 1 2
    stage 2 = 1 2
    coupled 0 = 1 2
    path 0 = 0: 1@1
    path 1 = 0: 1@2
    path 2 = 0: 2@1
    path 3 = 0: 2@2
    rank 0 = 0F0 0F1 0F2 0F3 0L0 0L1 0L2 0L3
    rank 1 = 1F0 2F2
    rank 2 = 2F3 1F1
    """
    with pytest.raises(
        ScheduleError, match="deadlock: rank 1 waits at 1F0 for 1F1 of rank 2; rank 2 waits at 2F3 for 2F2"
    ):
        validate(Schedule.parse(text))
    validate(Schedule.parse(text.replace("2F3 1F1", "1F1 2F3")))


def test_bundles_cost_what_their_slowest_part_does() -> None:
    cost = CostModel.uniform(2, 5, latency_s=1.0, bandwidth_Bps=8.0)
    latency = [[0.0 if a == b else 1.0 + a + b for b in range(5)] for a in range(5)]
    network = replace(cost.network, latency_s=tuple(map(tuple, latency)))
    compute = replace(cost.compute, rank_factor=(1.0, 1.0, 3.0, 2.0, 1.0))
    found = condense_costs(replace(cost, compute=compute, network=network), 1, 2)
    assert found.compute.rank_factor == (2.0, 3.0, 2.0)  # a driver does everything twice
    assert found.network.latency_s == ((0.0, 3.0, 5.0), (3.0, 0.0, 7.0), (5.0, 7.0, 0.0))
    assert condense_costs(cost, 1, 1) is cost


def test_what_is_coupled_otherwise_is_not_condensed() -> None:
    schedule = coupled("gpipe", bundles=2, stages=1)
    text = str(schedule).replace("1: 1@1", "1: 1@2").replace("rank 0 = 0F0 0F1", "rank 0 = 0F1 0F0")
    with pytest.raises(ScheduleError, match="do not work on bundles"):
        condense(Schedule.parse(text))
