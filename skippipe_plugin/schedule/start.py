"""Where the planner's search starts: units of microbatches with balanced, legal paths."""

from collections import Counter
from collections.abc import Iterator, Sequence

from skippipe_plugin.schedule.problem import Instance, PlanProblem
from skippipe_plugin.schedule.routes import deal_stages
from skippipe_plugin.schedule.search import State, Unit


def unit_sizes(problem: PlanProblem) -> list[int]:
    """Return how many microbatches may share a path; 1 is last.

    All stages are still visited equally often, and there are as many paths as a stage has replicas.
    """
    count, required = problem.microbatches_per_driver, len(problem.constraints.required)
    free, visits = len(problem.available) - required, problem.num_visits - required
    replicas = max(len(nodes) for nodes in problem.placement[1:])
    sizes: list[int] = []
    for size in range(count, 1, -1):
        fits = (sizes[-1] if sizes else count) % size == 0 and len(problem.drivers) * (count // size) >= replicas
        if fits and (not free or (len(problem.drivers) * (count // size) * visits) % free == 0):
            sizes.append(size)
    return [*sizes, 1]


def first_states(instance: Instance, targets: dict[int, int], size: int) -> list[State]:
    """Return some balanced states of legal paths, each visit on the node of its stage that has least to do.

    The paths ascend; or they are reordered so that stages take turns at being first, and no rank waits long for the
    first microbatches; or they are rotations, which leave no such wait at all, where the constraints allow them.

    Args:
        instance: The problem.
        targets: How many paths visit each stage.
        size: How many microbatches share each path.
    """
    problem = instance.problem
    num_paths = problem.num_microbatches // size
    fewer = {stage: count // size for stage, count in targets.items()}
    dealt = deal_stages(fewer, num_paths, problem.num_visits, problem.constraints)
    ascending = [tuple(stages) for stages in dealt]
    routes = [ascending, _spread(ascending, problem), _rotated(fewer, num_paths, problem)]
    return [_place(instance, way) for way in routes if way]


def _place(instance: Instance, routes: Sequence[tuple[int, ...]]) -> State:
    problem, caps = instance.problem, instance.machine.caps
    load = [0.0] * instance.num_nodes
    units: list[Unit] = []
    for number, stages in enumerate(routes):
        nodes = []
        for stage in stages:
            work = [f + b for f, b in zip(instance.forward_s[stage], instance.backward_s[stage], strict=True)]
            able = [node for node in problem.placement[stage] if caps[node] >= 1] or problem.placement[stage]
            nodes.append(min(able, key=lambda node: load[node] + work[node]))
            load[nodes[-1]] += work[nodes[-1]]
        units.append((number % len(problem.drivers), stages, tuple(nodes)))
    return State(problem.placement, tuple(sorted(units, key=lambda unit: unit[0])))


def _rotated(targets: dict[int, int], num_paths: int, problem: PlanProblem) -> list[tuple[int, ...]]:
    """Return paths that each start one stage after the last one's start; none where that is not legal."""
    stages, visits = sorted(targets), problem.num_visits
    ring = [*stages, *stages]
    windows = [tuple(ring[at : at + visits]) for at in range(len(stages))]
    if any(problem.constraints.why_illegal(window, problem.num_stages) for window in windows):
        return []
    rounds, rest = divmod(num_paths, len(stages))
    left = {stage: count - rounds * visits for stage, count in targets.items()}
    return windows * rounds + [tuple(path) for path in deal_stages(left, rest, visits, problem.constraints)]


def _spread(dealt: Sequence[tuple[int, ...]], problem: PlanProblem) -> list[tuple[int, ...]]:
    """Rotate and swap the paths as far as it is legal, so that stages take turns at each position of a path."""
    used: Counter[tuple[int, int]] = Counter()
    routes = []
    for stages in dealt:
        ways = [way for way in _reorderings(stages) if problem.constraints.why_illegal(way, problem.num_stages) is None]
        route = min(ways, key=lambda way: [used[at, stage] for at, stage in enumerate(way)])
        used.update(enumerate(route))
        routes.append(route)
    return routes


def _reorderings(stages: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the ascending stages, their rotations, and the same with two neighbours or two pairs of them swapped."""
    count = len(stages)
    for turn in range(count):
        yield stages[turn:] + stages[:turn]
    for i in range(count - 1):
        once = (*stages[:i], stages[i + 1], stages[i], *stages[i + 2 :])
        yield once
        for j in range(i + 2, count - 1):
            yield (*once[:j], once[j + 1], once[j], *once[j + 2 :])


def split(state: State, ratio: int) -> State:
    """Return the state with each unit cut into that many of equal paths."""
    own = [[unit for unit in state.units if unit[0] == place] for place in range(len(state.holders[0]))]
    return State(state.holders, tuple(unit for units in own for unit in units * ratio))
