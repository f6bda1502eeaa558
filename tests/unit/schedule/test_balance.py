"""A schedule is replaced when a plan is better by a margin, twice, and never because of noise."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    ComputeCost,
    CostModel,
    NetworkCost,
    PathConstraints,
    PlanProblem,
    condense_costs,
    expand,
    full_schedule,
    plan,
    simulate,
    validate,
)
from skippipe_plugin.schedule.balance import Balancer, SwitchRule
from skippipe_plugin.schedule.rolling import RollingCosts

PLACEMENT = ((0,), (1, 2), (3, 4), (5, 6))
quick = settings(derandomize=True, deadline=None, max_examples=12)


def costs(chance: random.Random, noise: float = 0.0, slow: dict[int, float] | None = None) -> CostModel:
    """Three equal stages with two replicas each; every number is off by up to ``noise``."""

    def off(value: float) -> float:
        return value * (1 + chance.uniform(-noise, noise))

    factor = tuple(off((slow or {}).get(rank, 1.0)) for rank in range(7))
    latency = tuple(tuple(off(0.2) for _ in range(7)) for _ in range(7))
    return CostModel(
        ComputeCost((0.1, 1.0, 1.0, 1.0), (0.1, 2.0, 2.0, 2.0), off(0.1), rank_factor=factor),
        NetworkCost(latency, ((inf,) * 7,) * 7),
        0,
    )


def problem(cost: CostModel, skip_ratio: float) -> PlanProblem:
    constraints = PathConstraints(skip_ratio=skip_ratio)
    return PlanProblem(placement=PLACEMENT, microbatches_per_driver=6, cost=cost, constraints=constraints)


def planned(cost: CostModel, skip_ratio: float, seed: int = 0):
    return plan(problem(cost, skip_ratio), max_iterations=4_000, seed=seed)


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.34]), st.floats(0.0, 0.1))
def test_noise_changes_nothing(seed, skip_ratio, noise):
    """Seconds off by a share e change simulated times by no more: no plan can seem better than the bound allows."""
    chance = random.Random(seed)
    truth = planned(costs(chance), skip_ratio)
    seems = (1 - noise) * truth.lower_bound_s / ((1 + noise) * truth.makespan_s)
    rule = SwitchRule(min_gain=min(0.99, 1 - seems + 0.01), min_steps=1)
    balancer = Balancer(rule)
    for step in range(1, 5):
        fresh, latest = costs(chance, noise), costs(chance, noise)
        decision = balancer.decide(
            truth.schedule,
            step,
            fresh,
            latest,
            problem(fresh, skip_ratio),
            lambda fresh=fresh: planned(fresh, skip_ratio),
        )
        assert decision.schedule is None


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.34]), st.integers(1, 6), st.floats(2.0, 20.0))
def test_what_replaces_a_schedule_is_better_and_then_stays(seed, skip_ratio, rank, factor):
    chance = random.Random(seed)
    rule = SwitchRule(min_gain=0.05, min_steps=3)
    schedule, balancer, changed = planned(costs(chance), skip_ratio).schedule, Balancer(rule), []
    slow = costs(chance, slow={rank: factor})
    for step in range(3, 15):
        decision = balancer.decide(
            schedule,
            step,
            slow,
            slow,
            problem(slow, skip_ratio),
            lambda step=step: planned(slow, skip_ratio, seed=step),
        )
        if decision.schedule is not None:
            before, after = (simulate(each, slow).makespan_s for each in (schedule, decision.schedule))
            assert after <= 0.95 * before
            assert (decision.present_s, decision.planned_s) == (before, after)
            visits = [
                sum(v.rank == rank for p in each.paths for v in p.visits) for each in (schedule, decision.schedule)
            ]
            named = f"rank {rank} ({slow.compute.rank_factor[rank]:.2g}x) {visits[0]} -> {visits[1]}"
            assert (named in decision.reason) == (visits[0] != visits[1])
            schedule = decision.schedule
            changed.append(step)
    assert all(later - earlier >= rule.min_steps for earlier, later in pairwise(changed))
    assert len(changed) <= 2  # each change is a gain on the same costs, so they end
    assert factor < 4 or changed


def slowed() -> tuple[CostModel, CostModel]:
    chance = random.Random(0)
    return costs(chance), costs(chance, slow={1: 4.0})


def test_a_gain_that_the_next_step_does_not_confirm_changes_nothing():
    even, slow = slowed()
    balancer, schedule = Balancer(SwitchRule(min_steps=1)), planned(even, 0.0).schedule
    first = balancer.decide(schedule, 10, slow, slow, problem(slow, 0.0), lambda: planned(slow, 0.0))
    assert "has to confirm it" in first.reason
    second = balancer.decide(schedule, 20, slow, even, problem(slow, 0.0), lambda: planned(slow, 0.0))
    assert (first.schedule, second.schedule) == (None, None)
    assert "not confirmed" in second.reason
    third = balancer.decide(schedule, 30, slow, even, problem(slow, 0.0), lambda: pytest.fail("planned twice"))
    assert "as they were" in third.reason


def test_a_schedule_runs_for_a_while():
    even, slow = slowed()
    balancer, schedule = Balancer(SwitchRule(min_steps=20)), planned(even, 0.0).schedule
    early = balancer.decide(schedule, 10, slow, slow, problem(slow, 0.0), lambda: pytest.fail("planned too early"))
    assert early.reason == "the schedule has run for 10 of min_steps=20"
    balancer.decide(schedule, 20, slow, slow, problem(slow, 0.0), lambda: planned(slow, 0.0))
    new = balancer.decide(schedule, 30, slow, slow, problem(slow, 0.0), lambda: planned(slow, 0.0)).schedule
    assert new is not None
    again = balancer.decide(new, 40, slow, slow, problem(slow, 0.0), lambda: pytest.fail("planned too early"))
    assert "for 10 of min_steps=20" in again.reason
    other = planned(even, 0.34).schedule  # somebody else changed it, such as a skip ratio over steps
    assert (
        "for 0 of"
        in balancer.decide(other, 60, slow, slow, problem(slow, 0.34), lambda: pytest.fail("planned too early")).reason
    )


def test_nothing_is_planned_where_the_bound_forbids_a_gain():
    cost = CostModel.uniform(1, 2)
    alone = PlanProblem(placement=((0,), (1,)), microbatches_per_driver=4, cost=cost)
    decision = Balancer(SwitchRule(min_steps=1)).decide(
        plan(alone, max_iterations=1000).schedule, 5, cost, cost, alone, lambda: pytest.fail("planned in vain")
    )
    assert decision.reason == "no plan is faster than 12 s, the running one takes 12 s"


def test_coupled_ranks_get_and_lose_microbatches_together():
    """Two groups of two that share experts: when one rank of a group is slow, pairs of microbatches leave the group."""
    bundled, size = full_schedule("1f1b", num_stages=1, num_microbatches=6, replicas=2), 2
    schedule = expand(bundled, size)
    assert schedule.coupled == ((1, 2), (3, 4))
    even = CostModel.uniform(1, 5)
    slow = replace(even, compute=replace(even.compute, rank_factor=(1.0, 1.0, 1.0, 3.0, 1.0)))
    together = PlanProblem(placement=bundled.placement, microbatches_per_driver=6, cost=condense_costs(slow, 1, size))

    def replan():
        found = plan(together, max_iterations=4_000)
        return replace(found, schedule=expand(found.schedule, size))

    balancer = Balancer(SwitchRule(min_steps=1))
    first = balancer.decide(schedule, 5, slow, slow, together, replan)
    new = balancer.decide(schedule, 10, slow, slow, together, replan).schedule
    assert new is not None
    validate(new)
    assert new.coupled == schedule.coupled
    assert simulate(new, slow).makespan_s == first.planned_s < first.present_s == simulate(schedule, slow).makespan_s
    visits = Counter(visit.rank for path in new.paths for visit in path.visits)
    assert visits[1] == visits[2] > visits[3] == visits[4] > 0


# ------------------------------------------------------------- rolling costs


def follow(rolling: RollingCosts, cost: CostModel, skip_ratio: float = 0.0, on: CostModel | None = None) -> None:
    schedule = planned(on or cost, skip_ratio).schedule
    rolling.add(simulate(schedule, cost), schedule)


def test_rolling_costs_are_those_of_the_steps():
    cost = costs(random.Random(0), noise=0.3)
    rolling = RollingCosts(replace(cost, compute=CostModel.uniform(3, 7).compute))
    assert rolling.model().compute == CostModel.uniform(3, 7).compute
    follow(rolling, cost)
    schedule = planned(cost, 0.0).schedule
    assert simulate(schedule, rolling.model()).makespan_s == pytest.approx(
        simulate(schedule, cost).makespan_s, rel=0.02
    )


def test_one_odd_step_does_not_move_the_medians():
    even, slow = slowed()
    rolling = RollingCosts(even, window=5)
    for cost in (even, even, slow):
        follow(rolling, cost, on=even)
    assert rolling.model().compute.rank_factor[1] == pytest.approx(1.0)
    assert rolling.model(latest=True).compute.rank_factor[1] > 1.5
    follow(rolling, slow, on=even)
    follow(rolling, slow, on=even)
    assert rolling.model().compute.rank_factor[1] > 1.5


def test_what_is_not_used_is_remembered_and_then_forgotten():
    even, _ = slowed()
    useless = costs(random.Random(0), slow={1: 1000.0})
    rolling = RollingCosts(even, window=1, memory=3)
    follow(rolling, useless, on=even)
    for _ in range(3):
        follow(rolling, useless)  # planned around rank 1
        assert rolling.model().compute.rank_factor[1] > 1.5
    follow(rolling, useless)
    assert rolling.model().compute.rank_factor[1] == 1.0


def test_links_that_no_step_used_are_as_slow_as_the_others_proved_to_be():
    cost = CostModel.uniform(2, 3, latency_s=0.5)
    rolling = RollingCosts(CostModel.uniform(2, 3, latency_s=0.1))
    follow_schedule = plan(
        PlanProblem(placement=((0,), (1,), (2,)), microbatches_per_driver=2, cost=cost), max_iterations=1000
    ).schedule
    rolling.add(simulate(follow_schedule, cost), follow_schedule)
    assert rolling.model().message_s(1, 0) == pytest.approx(0.5)


@pytest.mark.parametrize("arguments", [{"window": 0}, {"memory": 0}])
def test_windows_out_of_range(arguments):
    with pytest.raises(ValueError, match="counted from 1 on"):
        RollingCosts(CostModel.uniform(1, 2), **arguments)


@pytest.mark.parametrize("arguments", [{"min_gain": 0.0}, {"min_gain": 1.0}, {"min_steps": 0}])
def test_rules_out_of_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SwitchRule(**arguments)
