"""The simulator against an independent longest path through the same graph, and by hand."""

import random
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    Action,
    ComputeCost,
    CostModel,
    NetworkCost,
    Op,
    Path,
    Schedule,
    Visit,
    full_schedule,
    list_schedule,
    lower_bound_s,
    simulate,
)

quick = settings(derandomize=True, deadline=None, max_examples=80)


def random_schedule(chance: random.Random) -> Schedule:
    """Partial, reordered paths in some order; some backwards split, their weight halves at the end of the rank."""
    num_stages, num_drivers = chance.randint(1, 5), chance.randint(1, 2)
    placement = [list(range(num_drivers)), *([chance.randrange(num_drivers + 4)] for _ in range(num_stages))]
    paths = []
    for _ in range(chance.randint(1, 7)):
        stages = chance.sample(range(1, num_stages + 1), chance.randint(1, num_stages))
        paths.append(Path(chance.randrange(num_drivers), tuple(Visit(s, placement[s][0]) for s in stages)))
    caps = chance.choice([None, "position"])
    schedule = list_schedule(placement, paths, activation_caps=caps, driver_in_flight=chance.choice([None, 2]))
    return Schedule(schedule.placement, schedule.paths, tuple(split(order, chance) for order in schedule.orders))


def split(order: tuple[Action, ...], chance: random.Random) -> tuple[Action, ...]:
    done, later = [], []
    for action in order:
        if action.op is Op.B and action.stage and chance.random() < 0.5:
            done.append(Action(action.stage, Op.I, action.microbatch))
            later.append(Action(action.stage, Op.W, action.microbatch))
        else:
            done.append(action)
    return (*done, *later)


def random_cost(schedule: Schedule, chance: random.Random) -> CostModel:
    stages, ranks = schedule.num_stages + 1, range(schedule.num_ranks)

    def seconds(count: int) -> tuple[float, ...]:
        return tuple(chance.choice([0.0, chance.random()]) for _ in range(count))

    compute = ComputeCost(
        seconds(stages), seconds(stages), chance.random(), rank_factor=tuple(1 + chance.random() for _ in ranks)
    )
    bandwidth = tuple(tuple(1 + chance.random() for _ in ranks) for _ in ranks)
    network = NetworkCost(tuple(seconds(len(ranks)) for _ in ranks), bandwidth, overhead_s=chance.random())
    return CostModel(compute, network, tuple(chance.randrange(5) for _ in range(stages)))


def longest_path_s(schedule: Schedule, cost: CostModel) -> dict[Action, float]:
    """End of each action as the longest path to it, written without the package's own reading of a schedule."""
    rank = {action: r for r, order in enumerate(schedule.orders) for action in order}
    before: dict[Action, list[tuple[Action, float]]] = {action: [] for action in rank}
    for order in schedule.orders:
        for first, second in pairwise(order):
            before[second].append((first, 0.0))
    for m, path in enumerate(schedule.paths):
        outward = [0, *path.stages]
        forward = [Action(stage, Op.F, m) for stage in outward]
        gradients = [Action(stage, Op.B, m) for stage in reversed(outward)]
        gradients = [a if a in rank else Action(a.stage, Op.I, m) for a in gradients]
        hops = list(zip([*forward, Action(0, Op.L, m)], [*forward[1:], Action(0, Op.L, m), gradients[0]], strict=True))
        sizes = [*outward, outward[-1], *reversed(outward[:-1])]
        hops += pairwise(gradients)
        for (first, second), stage in zip(hops, sizes, strict=True):
            before[second].append((first, cost.message_s(rank[first], rank[second], stage)))

    @cache
    def end_s(action: Action) -> float:
        start_s = max((end_s(first) + delay_s for first, delay_s in before[action]), default=0.0)
        return start_s + cost.action_s(action, rank[action])

    return {action: end_s(action) for action in rank}


@quick
@given(st.integers(0, 10**9))
def test_equal_to_the_longest_path(seed):
    chance = random.Random(seed)
    schedule = random_schedule(chance)
    cost = random_cost(schedule, chance)
    timeline = simulate(schedule, cost)
    got = {event.action: event.end_s for event in timeline.events}
    assert got == pytest.approx(longest_path_s(schedule, cost))
    assert lower_bound_s(schedule, cost) <= timeline.makespan_s + 1e-9


@quick
@given(st.integers(0, 10**9))
def test_ranks_do_one_thing_at_a_time_and_wait_for_their_input(seed):
    chance = random.Random(seed)
    schedule = random_schedule(chance)
    timeline = simulate(schedule, random_cost(schedule, chance))
    for rank, order in enumerate(schedule.orders):
        own = [event for event in timeline.events if event.rank == rank]
        assert [event.action for event in own] == list(order)
        assert all(first.end_s <= second.start_s for first, second in pairwise(own))
    ends = {event.action: event.end_s for event in timeline.events}
    assert all(transfer.start_s == ends[transfer.action] <= transfer.end_s for transfer in timeline.transfers)


def test_by_hand():
    """0F 0-1, hop to 2, 1F 2-3, hop to 4, 0L 4-4.5, hop to 5.5, 1B 5.5-7.5, hop to 8.5, 0B 8.5-9.5."""
    schedule = full_schedule("gpipe", num_stages=1, num_microbatches=1)
    cost = CostModel.uniform(1, 2, loss_s=0.5, driver_s=1.0, latency_s=1.0)
    timeline = simulate(schedule, cost)
    spans = {str(event.action): (event.start_s, event.end_s) for event in timeline.events}
    assert spans == {"0F0": (0, 1), "1F0": (2, 3), "0L0": (4, 4.5), "1B0": (5.5, 7.5), "0B0": (8.5, 9.5)}
    assert lower_bound_s(schedule, cost) == 9.5
    assert [(str(t.action), t.source, t.destination) for t in timeline.transfers] == [
        ("0F0", 0, 1),
        ("1F0", 1, 0),
        ("0L0", 0, 1),
        ("1B0", 1, 0),
    ]


def test_the_gap_keeps_a_rank_busy_but_not_its_result():
    schedule = full_schedule("gpipe", num_stages=1, num_microbatches=2)
    uniform = CostModel.uniform(1, 2)
    compute = ComputeCost(uniform.compute.forward_s, uniform.compute.backward_s, 0.0, gap_s=0.25)
    cost = CostModel(compute, uniform.network, 0)
    starts = {str(event.action): event.start_s for event in simulate(schedule, cost).events}
    assert (starts["0F1"], starts["1F0"], starts["1F1"], starts["1B0"]) == (0.25, 0.0, 1.25, 2.5)
    assert lower_bound_s(schedule, cost) <= simulate(schedule, cost).makespan_s


def test_a_missing_cost_is_named():
    schedule = full_schedule("gpipe", num_stages=3, num_microbatches=1)
    for judge in (simulate, lower_bound_s):
        with pytest.raises(ValueError, match="covers 2 block stages and 4 ranks, the schedule has 3 and 4"):
            judge(schedule, CostModel.uniform(2, 4))
