"""Partial and exact schedules for measured costs, each with what the simulator says of it. No process, no network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skippipe_plugin.schedule import (
    CostModel,
    Path,
    PathConstraints,
    PlanProblem,
    Schedule,
    Visit,
    full_schedule,
    list_schedule,
    lower_bound_s,
    plan,
    simulate,
)

WORK = 100_000
"""Iterations of the planner, as many as the strategy allows itself."""


@dataclass(frozen=True)
class Entry:
    """A schedule and what is expected of it."""

    schedule: Schedule
    nodes: tuple[int, ...]
    """By rank of the schedule: the node it shall run on."""
    predicted_s: float
    bound_s: float
    """What no plan of the same kind can beat: for a planned schedule the planner's bound, else that of its paths."""


def predict(schedule: Schedule, cost: CostModel) -> Entry:
    """Simulate a schedule on links over which the bytes of messages queue."""
    nodes = tuple(range(schedule.num_ranks))
    return Entry(schedule, nodes, simulate(schedule, cost, links="queued").makespan_s, lower_bound_s(schedule, cost))


def exact(name: str, cost: CostModel, num_microbatches: int) -> Entry:
    """Every microbatch visits every stage, in the order of a named schedule."""
    return predict(full_schedule(name, num_stages=cost.num_stages, num_microbatches=num_microbatches), cost)


def at_random(cost: CostModel, num_microbatches: int, skip_ratio: float, seed: int) -> Entry:
    """Every microbatch draws one of the legal paths; nothing is planned."""
    placement, rules = placement_of(cost), PathConstraints(skip_ratio=skip_ratio)
    stages = range(1, cost.num_stages + 1)
    legal = sorted(rules.sequences(stages, rules.num_visits(cost.num_stages), cost.num_stages))
    drawn = random.Random(seed).choices(legal, k=num_microbatches)
    paths = [Path(0, tuple(Visit(stage, stage) for stage in sequence)) for sequence in drawn]
    return predict(list_schedule(placement, paths, driver_in_flight=2 * cost.num_ranks, name="random"), cost)


def planned(cost: CostModel, num_microbatches: int, skip_ratio: float, *, place: bool = False) -> Entry:
    """Plan paths and orders as the strategy does, and if told to also which node holds which stage."""
    problem = PlanProblem(
        placement=placement_of(cost),
        microbatches_per_driver=num_microbatches,
        cost=cost,
        constraints=PathConstraints(skip_ratio=skip_ratio),
        placement_mode="plan" if place else "given",
        links="queued",
    )
    found = plan(problem, max_iterations=WORK)
    hosts = [ranks[0] for ranks in found.schedule.placement]
    nodes = tuple(found.nodes[rank] for rank in hosts)
    return Entry(_by_stage(found.schedule, hosts), nodes, found.makespan_s, found.lower_bound_s)


def _by_stage(schedule: Schedule, hosts: Sequence[int]) -> Schedule:
    """Number the ranks anew: stage s, on rank ``hosts[s]`` so far, is on rank s."""
    return replace(
        schedule,
        placement=tuple((stage,) for stage in range(len(hosts))),
        paths=tuple(Path(0, tuple(Visit(stage, stage) for stage in path.stages)) for path in schedule.paths),
        orders=tuple(schedule.orders[rank] for rank in hosts),
    )


def placement_of(cost: CostModel) -> tuple[tuple[int, ...], ...]:
    """The driver on node 0, stage s on node s."""
    return tuple((rank,) for rank in range(cost.num_stages + 1))
