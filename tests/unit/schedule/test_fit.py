"""Costs that are read off a timeline make the simulator repeat it."""

import random

import pytest

from skippipe_plugin.schedule import (
    Action,
    ComputeCost,
    CostModel,
    Event,
    NetworkCost,
    Path,
    Schedule,
    Timeline,
    find_transfers,
    fit_costs,
    full_schedule,
    list_schedule,
    messages,
    simulate,
)

INF = float("inf")


def uneven(num_stages: int, num_ranks: int, *, seed: int = 0, gap_s: float = 0.0, latency_s: float = 0.3) -> CostModel:
    draw = random.Random(seed).uniform
    forward = (0.05, *(draw(0.5, 2.0) for _ in range(num_stages)))
    compute = ComputeCost(forward, tuple(2.1 * value for value in forward), 0.4, gap_s=gap_s)
    latency = tuple(tuple(draw(0.0, 2 * latency_s) for _ in range(num_ranks)) for _ in range(num_ranks))
    return CostModel(compute, NetworkCost(latency, ((INF,) * num_ranks,) * num_ranks), 0)


def partial() -> Schedule:
    texts = ["1@1 2@2 3@3", "2@2 1@1 4@4", "1@1 3@3 5@5", "2@2 4@4 3@3", "1@1 4@4 5@5", "3@3 2@2 5@5"]
    paths = [Path.parse(f"0: {text}") for text in texts * 2]
    return list_schedule([[0], [1], [2], [3], [4], [5]], paths, driver_in_flight=10, name="partial")


SCHEDULES = {
    "gpipe": full_schedule("gpipe", num_stages=4, num_microbatches=8),
    "1f1b": full_schedule("1f1b", num_stages=4, num_microbatches=8),
    "replicas": full_schedule("1f1b", num_stages=3, num_microbatches=8, replicas=2),
    "drivers": full_schedule("1f1b", num_stages=3, num_microbatches=4, replicas=2, drivers=2),
    "driver stage": full_schedule("1f1b", num_stages=3, num_microbatches=6, driver_stage=True),
    "partial": partial(),
}


@pytest.mark.parametrize("latency_s", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("gap_s", [0.0, 0.02])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_simulated_timeline_comes_back(schedule: Schedule, gap_s: float, latency_s: float) -> None:
    for seed in range(5):
        cost = uneven(schedule.num_stages, schedule.num_ranks, seed=seed, gap_s=gap_s, latency_s=latency_s)
        timeline = simulate(schedule, cost)
        again = simulate(schedule, fit_costs(timeline, schedule))
        assert again.makespan_s == pytest.approx(timeline.makespan_s, rel=0.02)


def test_a_noisy_timeline_comes_back_nearly() -> None:
    schedule = SCHEDULES["1f1b"]
    random_s = random.Random(3).uniform
    cost = uneven(4, 5)
    timeline = simulate(schedule, cost)
    pulled = [e._replace(end_s=e.end_s - random_s(0.0, 0.1) * e.duration_s) for e in timeline.events]
    again = simulate(schedule, fit_costs(Timeline(tuple(pulled)), schedule))
    assert again.makespan_s == pytest.approx(timeline.makespan_s, rel=0.1)


def test_split_backwards_and_slow_replicas_are_told_apart() -> None:
    paths = (Path.parse("0: 1@1"), Path.parse("0: 1@2"))
    orders = ("0F0 0F1 0L0 0L1 0B0 0B1", "1F0 1I0 1W0", "1F1 1I1 1W1")
    schedule = Schedule(
        ((0,), (1, 2)), paths, tuple(tuple(map(Action.parse, order.split())) for order in orders), name="split"
    )
    compute = ComputeCost((0.1, 1.0), (0.1, 2.0), 0.5, input_share=0.75, rank_factor=(1.0, 1.0, 3.0))
    timeline = simulate(schedule, CostModel(compute, CostModel.uniform(1, 3).network, 0))
    found = fit_costs(timeline, schedule)
    assert found.compute.input_share == pytest.approx(0.75)
    for action, rank in (("1F0", 1), ("1F1", 2), ("1I1", 2), ("1W0", 1)):
        expected = next(e.duration_s for e in timeline.of_rank(rank) if str(e.action) == action)
        assert found.action_s(Action.parse(action), rank) == pytest.approx(expected)


def test_what_was_never_seen_gets_the_median_of_its_kind() -> None:
    schedule = Schedule(((0,), (1,), (2,)), (Path.parse("0: 1@1"),), ((), (), ()))
    events = [("0F0", 0, 0, 1), ("1F0", 1, 3, 5), ("0L0", 0, 5, 6), ("1B0", 1, 8, 12), ("0B0", 0, 12, 13)]
    found = fit_costs(Timeline(tuple(Event(r, Action.parse(a), s, e) for a, r, s, e in events)), schedule)
    assert found.compute.forward_s == (1, 2, 2)
    assert found.compute.backward_s == (1, 4, 4)
    assert (found.message_s(0, 1), found.message_s(1, 0), found.message_s(1, 2)) == (2, 0, 1)


def test_no_events_no_costs() -> None:
    with pytest.raises(ValueError, match="says nothing about costs"):
        fit_costs(Timeline(()), SCHEDULES["1f1b"])


def test_transfers_are_the_simulators_where_they_were_waited_for() -> None:
    schedule = SCHEDULES["partial"]
    timeline = simulate(schedule, CostModel.uniform(5, 6, latency_s=0.5))
    found = find_transfers(schedule, timeline.events)
    assert sorted(found, key=str) == sorted(timeline.transfers, key=str)


def test_transfers_of_actions_that_were_not_measured_are_left_out() -> None:
    schedule = SCHEDULES["1f1b"]
    events = [e for e in simulate(schedule, CostModel.uniform(4, 5)).events if e.rank != 2]
    left = [m for m in messages(schedule) if 2 not in (m.source, m.destination)]
    assert len(find_transfers(schedule, events)) == len(left)


def test_a_consumer_may_begin_before_its_producers_clock_stops() -> None:
    schedule = Schedule(((0,), (1,)), (Path.parse("0: 1@1"),), ((), ()), backward=False)
    events = (Event(0, Action.parse("0F0"), 0.0, 1.0), Event(1, Action.parse("1F0"), 0.9, 2.0))
    (transfer,) = find_transfers(schedule, events)
    assert (transfer.start_s, transfer.end_s) == (0.9, 0.9)
