"""The SkipPipe planner: chooses paths, orders and, if it may, the placement, to make the step short.

SkipPipe (arXiv 2502.19913) lets each microbatch skip some stages and swap neighbours. `plan` first anneals coarse
paths (drivers with nodes of their own), then the path of each microbatch, then the order on each node; what it returns
has been proved to run under its caps.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from skippipe_plugin.schedule.bounds import lower_bound_s
from skippipe_plugin.schedule.ir import Action, Op, Path, Schedule, Visit
from skippipe_plugin.schedule.play import Played
from skippipe_plugin.schedule.polish import polish
from skippipe_plugin.schedule.problem import UNREACHABLE_S, Instance, PlanProblem, reordered
from skippipe_plugin.schedule.routes import deal_stages, visit_targets
from skippipe_plugin.schedule.search import Clock, Evaluator, PathSearch, State, Unit
from skippipe_plugin.schedule.simulate import simulate
from skippipe_plugin.schedule.validate import validate

_WORK_PER_SECOND = 500_000
"""Tasks played per second of budget: less than half of what one core does, so that the clock rarely ends a plan."""


Candidate = tuple[State, dict[tuple[int, ...], Played]]


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule that runs, and how good it is."""

    schedule: Schedule
    """Its ranks are the problem's nodes in the order of ``nodes``."""
    nodes: tuple[int, ...]
    """By rank of the schedule: the problem's node."""
    makespan_s: float
    """Simulated seconds of a step, gradient sums included."""
    lower_bound_s: float
    """No legal plan of the problem is faster."""
    idle_share: tuple[float, ...]
    """By rank: the share of the makespan in which it waits."""
    visits: tuple[int, ...]
    """By block stage: how many paths visit it. Sum these over plans and pass them to the next as ``history``."""

    @property
    def gap(self) -> float:
        """How far the makespan may be from the best possible one, as a share of the lower bound."""
        return self.makespan_s / self.lower_bound_s - 1 if self.lower_bound_s else 0.0


def plan(
    problem: PlanProblem,
    *,
    budget_s: float = 10.0,
    seed: int = 0,
    max_iterations: int | None = None,
    history: Sequence[int] = (),
    turn: int = 0,
) -> Plan:
    """Plan a step.

    The budget is spent as work first, and as time only where the machine is slower than expected: equal seeds give
    equal plans unless the clock had to end the search.
    """
    started_s = time.monotonic()
    work = budget_s * _WORK_PER_SECOND if max_iterations is None else float(max_iterations)
    late = (lambda: time.monotonic() - started_s > budget_s) if max_iterations is None else (lambda: False)
    clock = Clock(work, late)
    available = [stage for stage in problem.available]
    targets = visit_targets(
        problem.num_microbatches, problem.num_visits, available, problem.constraints.required, history, turn
    )
    instance = Instance(problem)
    bound_s = lower_bound_s(instance, targets)
    if bound_s >= UNREACHABLE_S:
        raise ValueError("unreachable")
    evaluator = Evaluator(instance, clock)
    state, outcomes = _search(evaluator, targets, seed, bound_s)
    print(["%.3f"%o.finish_s for o in outcomes.values()], clock.spent/clock.work)
    return _finish(instance, state, outcomes, bound_s, targets)


def _unit_sizes(problem: PlanProblem) -> list[int]:
    """Return how many microbatches may share a path such that all stages are still visited equally often, largest first."""
    count, required = problem.microbatches_per_driver, len(problem.constraints.required)
    free = len(problem.available) - required
    drivers, visits = len(problem.drivers), problem.num_visits - required
    sizes: list[int] = []
    for size in range(count, 1, -1):
        fits = (sizes[-1] if sizes else count) % size == 0
        if fits and (not free or (drivers * (count // size) * visits) % free == 0):
            sizes.append(size)
    return [*sizes, 1]


def _first_state(instance: Instance, targets: dict[int, int], size: int) -> State:
    """Return legal paths in ascending order, each visit on the node of its stage that has least to do."""
    problem, caps = instance.problem, instance.machine.caps
    drivers, each = len(problem.drivers), problem.microbatches_per_driver // size
    fewer = {stage: count // size for stage, count in targets.items()}
    dealt = deal_stages(fewer, drivers * each, problem.num_visits, problem.constraints)
    load: dict[int, float] = {}
    units: list[Unit] = []
    for number, stages in enumerate(dealt):
        nodes = []
        for stage in stages:
            able = [node for node in problem.placement[stage] if caps[node] >= 1] or problem.placement[stage]
            work = {n: load.get(n, 0.0) + instance.forward_s[stage][n] + instance.backward_s[stage][n] for n in able}
            node = min(able, key=lambda n: (work[n], load.get(n, 0.0)))
            load[node] = work[node] + 1e-9
            nodes.append(node)
        units.append((number % drivers, tuple(stages), tuple(nodes)))
    return State(problem.placement, tuple(sorted(units, key=lambda unit: unit[0])))


def _split(state: State, ratio: int) -> State:
    return State(state.holders, tuple(unit for unit in state.units for _ in range(ratio)))


def _search(evaluator: Evaluator, targets: dict[int, int], seed: int, bound_s: float) -> Candidate:
    """Anneal coarse paths a few times, then finer ones from the best, and return the best after a little polish."""
    problem, clock = evaluator.instance.problem, evaluator.clock
    sizes = _unit_sizes(problem)
    first = _first_state(evaluator.instance, targets, sizes[0])
    best: Candidate = (first, {})
    start = 0
    while clock.spent < 0.75 * clock.work and not clock.over() and _finish_s(best) > bound_s * (1 + 1e-12):
        coarse = []
        for start in range(start + 1, start + 4):
            search = PathSearch(evaluator, seed * 1000 + start)
            coarse.append(search.run(first, 0.04 * clock.work, target_s=bound_s, heat=0.04))
        state = min(coarse, key=evaluator.energy)
        best = min(best, _polished(evaluator, state, bound_s, seed, 0.02 * clock.work), key=_finish_s)
        for size, finer in pairwise(sizes):
            state = _split(state, size // finer)
            state = search.run(state, 0.15 * clock.work / (len(sizes) - 1), target_s=bound_s, heat=0.01)
            best = min(best, _polished(evaluator, state, bound_s, seed, 0.02 * clock.work), key=_finish_s)
        print(start, round(clock.spent/clock.work,2), round(evaluator.energy(state),3), round(_finish_s(best),3))
    return _polished(evaluator, best[0], bound_s, seed, clock.work - clock.spent, best[1])


def _finish_s(candidate: Candidate) -> float:
    return max((played.finish_s for played in candidate[1].values()), default=inf)


def _polished(
    evaluator: Evaluator,
    state: State,
    bound_s: float,
    seed: int,
    work: float,
    outcomes: dict[tuple[int, ...], Played] | None = None,
) -> Candidate:
    """Improve the orders of the groups of drivers that finish last, as long as that helps and the work lasts."""
    clock, machine = evaluator.clock, evaluator.instance.machine
    if outcomes is None:
        outcomes = {}
        for group in evaluator.groups(state):
            played = evaluator.best_play(evaluator.chains(state, group))
            if played is None:
                return state, {}
            outcomes[tuple(group)] = played
    outcomes, end, tries = dict(outcomes), clock.spent + work, dict.fromkeys(outcomes, 0)
    while not clock.over(end):
        group = max(outcomes, key=lambda group: outcomes[group].finish_s)
        if outcomes[group].finish_s <= bound_s * (1 + 1e-12) or tries[group] >= 4:
            break
        tries[group] += 1
        chains = evaluator.chains(state, group)
        tasks = len(chains) * len(chains[0].nodes)
        plays = int(min((end - clock.spent) / (0.4 * tasks), (500 + 10 * tasks) * 2 ** tries[group]))
        better = polish(
            chains, machine, outcomes[group], plays=plays, target_s=bound_s, seed=seed + tries[group],
            out_of_time=clock.is_late,
        )
        clock.spent += plays * 0.4 * tasks + tasks
        outcomes[group] = better
    return state, outcomes


def _finish(
    instance: Instance,
    state: State,
    outcomes: dict[tuple[int, ...], Played],
    bound_s: float,
    targets: dict[int, int],
) -> Plan:
    problem = instance.problem
    drivers = state.holders[0]
    nodes = (*drivers, *(node for node in range(instance.num_nodes) if node not in drivers))
    rank = {node: r for r, node in enumerate(nodes)}
    count = problem.microbatches_per_driver
    each = count * len(drivers) // len(state.units)
    paths = []
    for place, stages, hosts in state.units:
        visits = tuple(Visit(stage, rank[node]) for stage, node in zip(stages, hosts, strict=True))
        paths += [Path(place, visits)] * each
    orders: list[tuple[Action, ...]] = [()] * len(nodes)
    for group, played in outcomes.items():
        for node, order in enumerate(played.orders):
            if order:
                orders[rank[node]] = tuple(_action(task, group, count, paths) for task in order)
    placement = tuple(tuple(rank[node] for node in holders) for holders in state.holders)
    schedule = Schedule(placement, tuple(paths), tuple(orders), name="skippipe")
    caps = problem.memory_caps
    validate(schedule, memory_caps=None if caps is None else [caps[node] for node in nodes])
    timeline = simulate(schedule, reordered(problem.cost, nodes))
    makespan_s = max(played.finish_s for played in outcomes.values())
    visits = tuple(targets.get(stage, 0) for stage in range(1, problem.num_stages + 1))
    idle = tuple(timeline.idle_share(r) for r in range(len(nodes)))
    return Plan(schedule, nodes, makespan_s, bound_s, idle, visits)


def _action(task: int, group: Sequence[int], count: int, paths: Sequence[Path]) -> Action:
    """Return the action of a task of the chains of a group of drivers."""
    length = 2 * len(paths[0].visits) + 3
    number, at = divmod(task, length)
    microbatch = group[number % len(group)] * count + number // len(group)
    stages = (0, *paths[microbatch].stages)
    if at < len(stages):
        return Action(stages[at], Op.F, microbatch)
    if at == len(stages):
        return Action(0, Op.L, microbatch)
    return Action(stages[length - 1 - at], Op.B, microbatch)
