"""The SkipPipe planner: chooses paths, orders and, if it may, the placement, to make the step short.

SkipPipe (arXiv 2502.19913) lets each microbatch skip some stages and swap neighbours. `plan` anneals coarse paths
first (drivers with nodes of their own), then the path of each microbatch, then the order on each node. What it returns
has been proved to run under its caps. The parts live in `problem`, `routes`, `search`, `polish`, `play`, `bounds`.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from skippipe_plugin.schedule.bounds import plan_bound_s
from skippipe_plugin.schedule.cost import CostModel
from skippipe_plugin.schedule.ir import DRIVER_STAGE, Action, Op, Path, Schedule, ScheduleError, Visit
from skippipe_plugin.schedule.play import Chain, Played
from skippipe_plugin.schedule.polish import polish
from skippipe_plugin.schedule.problem import UNREACHABLE_S, Instance, PlanProblem, reordered
from skippipe_plugin.schedule.routes import PathConstraints, visit_targets
from skippipe_plugin.schedule.search import Clock, Evaluator, PathSearch, State
from skippipe_plugin.schedule.simulate import simulate
from skippipe_plugin.schedule.start import first_states, split, unit_sizes
from skippipe_plugin.schedule.validate import validate

_WORK_PER_SECOND = 250_000
"""Tasks played per second of budget: about a quarter of what one core does, so that the clock rarely ends a plan."""
_ENOUGH = 1 + 1e-9
"""A plan within this factor of the lower bound is not improved further."""


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
    """By rank: the share of the simulated step in which it waits."""
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
    max_iterations: int | None = None,
    seed: int = 0,
    history: Sequence[int] = (),
    turn: int | None = None,
) -> Plan:
    """Plan a step: choose paths and orders, and the placement where the problem leaves it open.

    Equal arguments give equal plans: the budget is converted to work, about a quarter of what a core does in that time,
    and the clock ends the search only where the machine is slower than that.

    Args:
        problem: What to plan.
        budget_s: Seconds after which the search ends at the latest; it ends earlier at the lower bound.
        max_iterations: The work itself, in tasks played, in place of ``budget_s``: no clock, same plan anywhere.
        seed: Of the search.
        history: By block stage, the visits of all earlier plans. Where stages cannot be visited equally often, those
            with fewest visits get one more; so over successive plans all are skipped equally often.
        turn: The number of the plan, which decides among equal histories, also without any. By default the search
            decides, which is best for a single plan.

    Raises:
        ValueError: No plan exists, or a part of the problem is out of range; the message names the constraint.
    """
    if not (0 < budget_s < inf) or (max_iterations is not None and max_iterations < 1):
        raise ValueError(f"budget_s={budget_s}, max_iterations={max_iterations}: give the search some positive budget")
    if history and len(history) != problem.num_stages:
        raise ValueError(f"history has {len(history)} entries for {problem.num_stages} block stages")
    end_s = time.monotonic() + budget_s if max_iterations is None else inf
    work = budget_s * _WORK_PER_SECOND if max_iterations is None else float(max_iterations)
    instance = Instance(problem)
    targets, tied = _targets(problem, history, turn)
    bound_s = _bound_s(instance, targets, tied)
    if bound_s >= UNREACHABLE_S:
        raise ValueError(
            "unreachable links: some driver has no round trip over links of finite cost through "
            f"{problem.num_visits} stages; connect it, or place the stages elsewhere"
        )
    search = _Search(Evaluator(instance, Clock(work, lambda: time.monotonic() > end_s)), targets, tied, bound_s, seed)
    return _finish(instance, search.run(), bound_s)


def least_s(problem: PlanProblem) -> float:
    """Return a time that no plan of the problem can beat, whatever was visited before."""
    targets, tied = _targets(problem)
    return _bound_s(Instance(problem), targets, tied)


def _targets(
    problem: PlanProblem, history: Sequence[int] = (), turn: int | None = None
) -> tuple[dict[int, int], frozenset[int]]:
    required = problem.constraints.required
    return visit_targets(problem.num_microbatches, problem.num_visits, problem.available, required, history, turn)


def _bound_s(instance: Instance, targets: dict[int, int], tied: frozenset[int]) -> float:
    return plan_bound_s(instance, {stage: count - (stage in tied) for stage, count in targets.items()})


def plan_paths(
    cost: CostModel,
    placement: Sequence[Sequence[int]],
    microbatches_per_driver: int,
    *,
    constraints: PathConstraints | None = None,
    driver_in_flight: int | None = None,
    allreduce_s: Sequence[float] = (),
    history: Sequence[int] = (),
    turn: int | None = None,
    seed: int = 0,
    max_iterations: int = 60_000,
) -> Schedule:
    """Plan a step quickly and deterministically, for use while training.

    >>> cost = CostModel.uniform(num_stages=4, num_ranks=5)
    >>> schedule = plan_paths(cost, [[0], [1], [2], [3], [4]], 8, constraints=PathConstraints(skip_ratio=0.25))
    >>> {len(path.visits) for path in schedule.paths}
    {3}

    Args:
        cost: The measured costs.
        placement: By stage, the ranks that hold it: entry 0 the drivers 0, 1, ..., an empty one a hole.
        microbatches_per_driver: Number of microbatches of each driver.
        constraints: What paths must keep; nothing skipped by default.
        driver_in_flight: The most microbatches that a driver may have under way, which bounds the activations
            everywhere; by default twice the number of ranks for each driver.
        allreduce_s: By stage, seconds of its gradient sum.
        history: As in `plan`.
        turn: As in `plan`.
        seed: Of the search.
        max_iterations: Work in tasks played; the default takes a tenth of a second or two.

    Raises:
        ValueError: No plan exists; the message names the violated constraint.
    """
    drivers = tuple(placement[DRIVER_STAGE]) if placement else ()
    if drivers != tuple(range(len(drivers))):
        raise ValueError(f"the drivers are ranks {drivers}; number the ranks so that drivers are 0, 1, ...")
    in_flight = 2 * cost.num_ranks if driver_in_flight is None else driver_in_flight
    if in_flight < 1:
        raise ValueError(f"driver_in_flight is {in_flight}; a driver needs at least 1 microbatch in flight")
    own = Counter(rank for ranks in placement for rank in ranks)
    enough = len(drivers) * microbatches_per_driver * len(placement)
    caps = [in_flight * own[rank] if rank in drivers else enough for rank in range(cost.num_ranks)]
    problem = PlanProblem(
        placement=tuple(map(tuple, placement)),
        microbatches_per_driver=microbatches_per_driver,
        cost=cost,
        constraints=constraints or PathConstraints(),
        memory_caps=tuple(caps),
        allreduce_s=tuple(allreduce_s),
    )
    return plan(problem, seed=seed, max_iterations=max_iterations, history=history, turn=turn).schedule


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Paths with the best known orders of each group of drivers that share nodes."""

    state: State
    outcomes: dict[tuple[int, ...], Played]

    @property
    def finish_s(self) -> float:
        return max((played.finish_s for played in self.outcomes.values()), default=inf)


class _Search:
    """Spends the budget: rounds of annealing from coarse to fine, each polished, and the rest for the best one."""

    def __init__(
        self, evaluator: Evaluator, targets: dict[int, int], tied: frozenset[int], bound_s: float, seed: int
    ) -> None:
        self.evaluator = evaluator
        self.clock = evaluator.clock
        self.problem = evaluator.instance.problem
        self.targets = targets
        self.tied = tied
        self.bound_s = bound_s
        self.seed = seed

    def run(self) -> _Candidate:
        sizes = unit_sizes(self.problem)
        first, finest = map(self._first, (sizes[0], sizes[-1]))
        best = min(self._polished(first, 0.01), self._polished(finest, 0.01), key=lambda candidate: candidate.finish_s)
        start = 0
        while self.clock.spent < 0.75 * self.clock.work and not self._is_done(best):
            coarse = [self._anneal(first, 0.04, start + number, heat=0.04) for number in range(3)]
            start += len(coarse)
            state = min(coarse, key=self.evaluator.energy)
            best = min(best, self._polished(state, 0.02), key=lambda candidate: candidate.finish_s)
            for size, finer in pairwise(sizes):
                if self._is_done(best):
                    break
                state = self._anneal(split(state, size // finer), 0.15 / (len(sizes) - 1), start, heat=0.01)
                best = min(best, self._polished(state, 0.02), key=lambda candidate: candidate.finish_s)
        return self._polished(best.state, 1.0, best.outcomes)

    def _first(self, size: int) -> State:
        return min(first_states(self.evaluator.instance, self.targets, size), key=self.evaluator.energy)

    def _is_done(self, best: _Candidate) -> bool:
        return self.clock.over() or best.finish_s <= self.bound_s * _ENOUGH

    def _anneal(self, state: State, share: float, start: int, *, heat: float) -> State:
        search = PathSearch(self.evaluator, self.seed * 1000 + start, self.tied)
        return search.run(state, share * self.clock.work, target_s=self.bound_s, heat=heat)

    def _polished(
        self, state: State, share: float, outcomes: dict[tuple[int, ...], Played] | None = None
    ) -> _Candidate:
        """Improve the orders of the group that finishes last, again and again, as long as the share of work lasts."""
        groups = {tuple(group): self.evaluator.chains(state, group) for group in self.evaluator.groups(state)}
        if not outcomes:
            played = {group: self.evaluator.best_play(chains) for group, chains in groups.items()}
            outcomes = {group: outcome for group, outcome in played.items() if outcome is not None}
            if len(outcomes) < len(groups):
                return _Candidate(state, {})
        best, end = _Candidate(state, dict(outcomes)), self.clock.spent + share * self.clock.work
        tries, caps = dict.fromkeys(groups, 0), self.evaluator.instance.machine.caps
        while not self.clock.over(end) and best.finish_s > self.bound_s * _ENOUGH:
            group = max(best.outcomes, key=lambda group: best.outcomes[group].finish_s)
            if tries[group] == 6:
                break
            tries[group] += 1
            played_better = self._polish_group(groups[group], best.outcomes[group], tries[group], end)
            for other, chains in groups.items():
                twin = played_better if other == group else _as_twin(groups[group], played_better, chains, caps)
                if twin is not None and twin.finish_s <= best.outcomes[other].finish_s:
                    best.outcomes[other] = twin
        return best

    def _polish_group(self, chains: list[Chain], played: Played, tries: int, end: float) -> Played:
        tasks = len(chains) * len(chains[0].nodes)
        plays = int(min((end - self.clock.spent) / (0.4 * tasks), (500 + 10 * tasks) * 2**tries))
        self.clock.spent += plays * 0.4 * tasks + tasks
        return polish(
            chains,
            self.evaluator.instance.machine,
            played,
            plays=plays,
            target_s=self.bound_s,
            seed=self.seed + tries,
            heat=0.01 if tries % 2 else 0.03,
            out_of_time=self.clock.is_late,
        )


def _as_twin(chains: Sequence[Chain], played: Played, others: Sequence[Chain], caps: Sequence[float]) -> Played | None:
    """Return the outcome for other chains that differ in the names of their nodes only, or None if they differ more."""
    names: dict[int, int] = {}
    if len(chains) != len(others):
        return None
    for mine, theirs in zip(chains, others, strict=True):
        if mine.costs != theirs.costs:
            return None
        for a, b in zip(mine.nodes, theirs.nodes, strict=True):
            if names.setdefault(a, b) != b:
                return None
    if len(set(names.values())) < len(names) or any(caps[a] > caps[b] for a, b in names.items()):
        return None
    orders: list[list[int]] = [[] for _ in played.orders]
    for a, b in names.items():
        orders[b] = played.orders[a]
    return Played(played.finish_s, played.finishes_s, orders)


def _finish(instance: Instance, best: _Candidate, bound_s: float) -> Plan:
    """Turn the search's result into a schedule, and prove that it runs."""
    problem = instance.problem
    if not best.outcomes:
        raise ValueError(
            f"caps too small: under the memory caps {problem.memory_caps} even one microbatch at a time locks up; "
            "raise them"
        )
    if best.finish_s >= UNREACHABLE_S:
        raise ValueError(
            "unreachable links: no plan was found that visits all stages equally often over links of finite cost; "
            "connect more nodes, place the stages elsewhere, or give a larger budget"
        )
    schedule, nodes = _schedule(instance, best)
    caps = problem.memory_caps
    try:
        validate(schedule, memory_caps=None if caps is None else [caps[node] for node in nodes])
    except ScheduleError as error:
        raise AssertionError(f"the planner made an invalid schedule: {error}") from error
    timeline = simulate(schedule, reordered(problem.cost, nodes), links=problem.links)
    counts = Counter(stage for path in schedule.paths for stage in path.stages)
    visits = tuple(counts[stage] for stage in range(1, problem.num_stages + 1))
    idle_share = tuple(timeline.idle_share(rank) for rank in range(len(nodes)))
    assert bound_s <= best.finish_s * _ENOUGH, f"a plan of {best.finish_s} s is below the proven bound of {bound_s} s"
    return Plan(schedule, nodes, best.finish_s, min(bound_s, best.finish_s), idle_share, visits)


def _schedule(instance: Instance, best: _Candidate) -> tuple[Schedule, tuple[int, ...]]:
    holders, count = best.state.holders, instance.problem.microbatches_per_driver
    drivers = holders[DRIVER_STAGE]
    nodes = (*drivers, *(node for node in range(instance.num_nodes) if node not in drivers))
    rank = {node: at for at, node in enumerate(nodes)}
    each = count * len(drivers) // len(best.state.units)
    paths: list[Path] = []
    for place, stages, hosts in split(best.state, each).units:
        visits = tuple(Visit(stage, rank[node]) for stage, node in zip(stages, hosts, strict=True))
        paths.append(Path(place, visits))
    orders: list[tuple[Action, ...]] = [()] * len(nodes)
    for group, played in best.outcomes.items():
        for node, order in enumerate(played.orders):
            if order:
                orders[rank[node]] = tuple(_action(task, group, count, paths) for task in order)
    placement = tuple(tuple(rank[node] for node in stage) for stage in holders)
    return Schedule(placement, tuple(paths), tuple(orders), name="skippipe"), nodes


def _action(task: int, group: Sequence[int], count: int, paths: Sequence[Path]) -> Action:
    """Return the action of a task of the chains of a group of drivers."""
    length = 2 * len(paths[0].visits) + 3
    number, at = divmod(task, length)
    microbatch = group[number % len(group)] * count + number // len(group)
    stages = (DRIVER_STAGE, *paths[microbatch].stages)
    if at < len(stages):
        return Action(stages[at], Op.F, microbatch)
    if at == len(stages):
        return Action(DRIVER_STAGE, Op.L, microbatch)
    return Action(stages[length - 1 - at], Op.B, microbatch)
