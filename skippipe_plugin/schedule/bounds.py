"""How fast no plan of a problem can be: proven lower bounds on the makespan."""

from collections.abc import Callable, Sequence
from itertools import islice
from math import inf, isinf

from skippipe_plugin.schedule.problem import Instance

_MAX_SEQUENCES = 1000

Host = tuple[int, int]
"""A stage and the node that computes it."""


def plan_bound_s(instance: Instance, targets: dict[int, int]) -> float:
    """Return a time that no legal plan can beat.

    The larger of: what the slowest driver needs for its microbatches at the cheapest round trip, its cap, its gaps and
    its own work considered; and for each stage its visits shared ideally among the nodes that hold it, between the
    earliest arrival and the least that must follow. With a free placement drivers and holders are the best ones.

    Args:
        instance: The problem.
        targets: How many paths visit each stage.
    """
    problem = instance.problem
    if problem.placement_mode == "plan":
        nodes = range(instance.num_nodes)
        bounds = sorted(_driver_bound_s(instance, node, _free_trip_s(instance, node)) for node in nodes)
        return bounds[len(problem.drivers) - 1]
    trips = [_driver_bound_s(instance, driver, _trip_s(instance, driver)) for driver in problem.drivers]
    return max(*trips, *(_stage_bound_s(instance, stage, count) for stage, count in targets.items()))


def _driver_bound_s(instance: Instance, driver: int, trip_s: float) -> float:
    """Return the least time for a driver's microbatches when each takes ``trip_s`` alone.

    ``begun[j]`` and ``ended[j]`` bound the start of its j-th forward and the end of its j-th backward. With a cap of K
    the forward j waits for j - K backwards to end; between the end of backward i and it, the driver runs the backwards
    i + 1 to j - K, and the forwards K + i to j - 1, none of which could begin before.
    """
    count, gap = instance.problem.microbatches_per_driver, instance.machine.gap_s
    forward, backward = instance.forward_s[0][driver] + gap, instance.backward_s[0][driver] + gap
    cap = count if isinf(instance.machine.caps[driver]) else int(instance.machine.caps[driver])
    if cap < 1:
        return inf
    begun, ended = [0.0], [0.0]
    for j in range(1, count + 1):
        starts = [begun[j - 1] + forward if j > 1 else 0.0]
        starts += [ended[i] + gap + (j - cap - i) * (forward + backward) for i in range(1, j - cap + 1)]
        begun.append(max(starts))
        ended.append(max(begun[j] + trip_s, ended[j - 1] + backward if j > 1 else 0.0))
    after = [ended[i] + (count - i) * backward + max(0, count - cap - i + 1) * forward for i in range(1, count + 1)]
    return max(count * (forward + backward + instance.loss_s[driver] + gap) - gap, *after)


def _stage_bound_s(instance: Instance, stage: int, count: int) -> float:
    """Return the least time for the visits of a stage, shared among its nodes as if they could be cut to pieces."""
    gap, drivers = instance.machine.gap_s, instance.problem.drivers
    nodes = [node for node in instance.problem.placement[stage] if instance.machine.caps[node] >= 1]
    if not count:
        return 0.0
    arrival_s = min(instance.forward_s[0][d] + instance.hop_s[0][d][node] for d in drivers for node in nodes)
    return_s = min(instance.backward_s[0][d] + instance.hop_s[0][node][d] for d in drivers for node in nodes)
    work = [instance.forward_s[stage][node] + instance.backward_s[stage][node] + 2 * gap for node in nodes]
    if min(work) <= 0:
        return 0.0
    direct = arrival_s + count / sum(1 / seconds for seconds in work) - gap + return_s
    # Hops by way of other stages may be cheaper than the direct ones, which then bound nothing.
    return direct if _is_metric(instance) else count / sum(1 / seconds for seconds in work) - gap


def _is_metric(instance: Instance) -> bool:
    hop, nodes = instance.hop_s[0], range(instance.num_nodes)
    same = all(table is hop for table in instance.hop_s)
    return same and all(hop[a][b] <= hop[a][c] + hop[c][b] + 1e-12 for a in nodes for b in nodes for c in nodes)


def _trip_s(instance: Instance, driver: int) -> float:
    """Return the cheapest round trip of a driver on the given placement; less where there are too many to list."""
    problem, caps = instance.problem, instance.machine.caps
    hosts = {
        stage: [(stage, node) for node in problem.placement[stage] if caps[node] >= 1] for stage in problem.available
    }
    legal = problem.constraints.sequences(problem.available, problem.num_visits, problem.num_stages)
    sequences = list(islice(legal, _MAX_SEQUENCES + 1))
    if len(sequences) <= _MAX_SEQUENCES:
        ways = (_cheapest_s(instance, driver, [hosts[stage] for stage in stages]) for stages in sequences)
        return min(ways, default=inf)
    everywhere = [host for stage in problem.available for host in hosts[stage]]
    return _cheapest_s(instance, driver, [everywhere] * problem.num_visits, lambda a, b: a[0] != b[0])


def _free_trip_s(instance: Instance, driver: int) -> float:
    """Return a bound on the round trips of a driver if every other node could hold any stage."""
    problem = instance.problem
    costs = {
        stage: (tuple(instance.forward_s[stage]), tuple(instance.backward_s[stage]), id(instance.hop_s[stage]))
        for stage in problem.available
    }
    kinds = {cost: stage for stage, cost in costs.items()}  # one of the stages that cost the same
    held = {node for nodes in problem.placement for node in nodes}
    hosts = [(stage, node) for stage in kinds.values() for node in sorted(held) if node != driver]
    if driver not in held or instance.machine.caps[driver] < 1:
        return inf
    return _cheapest_s(instance, driver, [hosts] * problem.num_visits, lambda a, b: a[1] != b[1])


def _cheapest_s(
    instance: Instance,
    driver: int,
    layers: Sequence[Sequence[Host]],
    follows: Callable[[Host, Host], bool] = lambda a, b: True,
) -> float:
    """Return the cheapest way there and back through one host of each layer."""
    ends = {(0, driver): instance.forward_s[0][driver] + instance.backward_s[0][driver] + instance.loss_s[driver]}
    for layer in layers:
        longer = {}
        for host in layer:
            stage, node = host
            ways = (cost + _both_s(instance, last, node) for last, cost in ends.items() if follows(last, host))
            work = instance.forward_s[stage][node] + instance.backward_s[stage][node]
            longer[host] = min(ways, default=inf) + work
        ends = longer
    return min((cost + _both_s(instance, last, driver) for last, cost in ends.items()), default=inf)


def _both_s(instance: Instance, source: Host, node: int) -> float:
    """Return the seconds of the message from a host to a node and of the gradient that comes back."""
    table = instance.hop_s[source[0]]
    return table[source[1]][node] + table[node][source[1]]
