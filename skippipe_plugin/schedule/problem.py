"""What the planner is asked: nodes, stages, costs, caps and constraints, as one value that refuses nonsense.

Also the same problem as plain numbers, `Instance`, from which the search takes its chains.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf
from typing import Literal, get_args

from skippipe_plugin.schedule.cost import CostModel, Links, NetworkCost
from skippipe_plugin.schedule.ir import DRIVER_STAGE, Action, Op
from skippipe_plugin.schedule.play import Chain, Machine
from skippipe_plugin.schedule.routes import PathConstraints

UNREACHABLE_S = 1e9
"""What the search charges for a link that does not exist; no plan that pays it is returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanProblem:
    """Everything that decides which plan is best.

    Nodes are numbered as in the cost model. In the planned schedule the drivers come first; `Plan.nodes` maps back.

    Raises:
        ValueError: The parts do not fit together or no plan can exist; the message names the violated constraint.
    """

    placement: tuple[tuple[int, ...], ...]
    """By stage: the nodes that hold it. Entry 0 is the drivers; several nodes are replicas, none is a hole."""
    microbatches_per_driver: int
    cost: CostModel
    constraints: PathConstraints = field(default_factory=PathConstraints)
    memory_caps: tuple[int, ...] | None = None
    """By node: the most (stage, microbatch) pairs that may live there at once; None for no caps."""
    placement_mode: Literal["given", "plan"] = "given"
    """"plan": which node holds which stage may change, the drivers included; how many hold each stage may not."""
    links: Links = "free"
    """What messages on one directed link wait for."""
    unreachable: frozenset[tuple[int, int]] = frozenset()
    """The directed links (from, to) that do not exist."""
    allreduce_s: tuple[float, ...] = ()
    """By stage: seconds that the sum of its gradients over its replicas takes after its last backward; empty: 0."""

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_placement(self)
        _check_caps(self)
        self.constraints.num_visits(self.num_stages, len(self.available))
        for stage in self.constraints.required:
            if stage not in self.available:
                raise ValueError(f"stage {stage} is required in every path, but no node holds it; place it")
        if len(self.constraints.required) > self.num_visits:
            raise ValueError(
                f"{len(self.constraints.required)} stages are required, but a path visits only {self.num_visits}; "
                "skip less or require fewer"
            )

    @property
    def drivers(self) -> tuple[int, ...]:
        """The nodes that hold stage 0."""
        return self.placement[DRIVER_STAGE]

    @property
    def num_stages(self) -> int:
        """The number of block stages, holes included."""
        return len(self.placement) - 1

    @property
    def available(self) -> tuple[int, ...]:
        """The block stages that some node holds."""
        return tuple(stage for stage, nodes in enumerate(self.placement) if stage and nodes)

    @property
    def num_visits(self) -> int:
        """The number of stages that each path visits."""
        return self.constraints.num_visits(self.num_stages, len(self.available))

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of all drivers together."""
        return len(self.drivers) * self.microbatches_per_driver


def reordered(cost: CostModel, nodes: Sequence[int]) -> CostModel:
    """Return the cost model with ranks renumbered: the new rank r is the old rank ``nodes[r]``."""

    def pick(matrix: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(matrix[a][b] for b in nodes) for a in nodes)

    factor = cost.compute.rank_factor
    compute = replace(cost.compute, rank_factor=tuple(factor[node] for node in nodes) if factor else ())
    network = NetworkCost(pick(cost.network.latency_s), pick(cost.network.bandwidth_Bps), cost.network.overhead_s)
    return replace(cost, compute=compute, network=network)


class Instance:
    """A problem as plain numbers; makes the chain of any path, each distinct one once."""

    def __init__(self, problem: PlanProblem) -> None:
        self.problem = problem
        self.num_nodes = problem.cost.num_ranks
        caps: Sequence[float] = problem.memory_caps or (inf,) * self.num_nodes
        self.machine = Machine(tuple(caps), problem.cost.compute.gap_s, problem.links != "free")
        nodes, stages = range(self.num_nodes), range(problem.num_stages + 1)
        second = problem.cost.action_s
        self.forward_s = [[second(Action(stage, Op.F, 0), node) for node in nodes] for stage in stages]
        self.backward_s = [[second(Action(stage, Op.B, 0), node) for node in nodes] for stage in stages]
        self.loss_s = [second(Action(DRIVER_STAGE, Op.L, 0), node) for node in nodes]
        self.hop_s = self._tables(self._hop_s)
        """By stage whose output travels, then from node to node."""
        self.occupied_s = self._tables(functools.partial(problem.cost.occupied_s, problem.links))
        self.allreduce_s = problem.allreduce_s or (0.0,) * len(stages)
        self._chains: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Chain] = {}

    def _hop_s(self, source: int, destination: int, stage: int) -> float:
        if (source, destination) in self.problem.unreachable:
            return UNREACHABLE_S
        return self.problem.cost.message_s(source, destination, stage)

    def _tables(self, seconds: Callable[[int, int, int], float]) -> list[list[list[float]]]:
        """Tabulate what a message costs from node to node; stages of equal size share one table."""
        sizes, nodes = self.problem.cost.activation_bytes, range(self.num_nodes)
        tables: dict[int, list[list[float]]] = {}
        result = []
        for stage in range(self.problem.num_stages + 1):
            size = sizes if isinstance(sizes, int) else sizes[stage]
            if size not in tables:
                tables[size] = [[seconds(a, b, stage) for b in nodes] for a in nodes]
            result.append(tables[size])
        return result

    def chain(self, driver: int, stages: tuple[int, ...], nodes: tuple[int, ...]) -> Chain:
        """Return the tasks of a microbatch that visits the stages on the nodes."""
        key = (driver, stages, nodes)
        if key not in self._chains:
            self._chains[key] = self._build(driver, stages, nodes)
        return self._chains[key]

    def _build(self, driver: int, stages: tuple[int, ...], nodes: tuple[int, ...]) -> Chain:
        hosts, visited = (driver, *nodes), (DRIVER_STAGE, *stages)
        visits = list(zip(visited, hosts, strict=True))
        durations = [self.forward_s[stage][node] for stage, node in visits]
        durations += [self.loss_s[driver], *(self.backward_s[stage][node] for stage, node in reversed(visits))]
        tails = [0.0] * (len(visits) + 1) + [self.allreduce_s[stage] for stage in reversed(visited)]
        ways = [*pairwise(hosts), (hosts[-1], driver)]
        messages = [(stage, a, b) for stage, (a, b) in zip(visited, ways, strict=True)]
        messages += [(stage, b, a) for stage, a, b in reversed(messages)]
        hops = [self.hop_s[stage][a][b] for stage, a, b in messages]
        occupied = [self.occupied_s[stage][a][b] for stage, a, b in messages]
        requests = [self.problem.cost.request_s(self.problem.links, driver, a, b) for _, a, b in messages]
        nodes = (*hosts, driver, *reversed(hosts))
        return Chain(nodes, tuple(durations), (*hops, 0.0), (*occupied, 0.0), (*requests, 0.0), tuple(tails))

    def round_trip_s(self, driver: int, stages: tuple[int, ...], nodes: tuple[int, ...]) -> float:
        """Return what one microbatch alone takes."""
        chain = self.chain(driver, stages, nodes)
        return sum(chain.durations_s) + sum(chain.hops_s)


def _check_counts(problem: PlanProblem) -> None:
    if not problem.placement or not problem.drivers:
        raise ValueError("the placement has no driver; its entry 0 lists the nodes that hold stage 0")
    if problem.microbatches_per_driver < 1:
        raise ValueError(f"microbatches_per_driver is {problem.microbatches_per_driver}; give at least 1")
    if problem.placement_mode not in ("given", "plan") or problem.links not in get_args(Links):
        raise ValueError(
            f"placement_mode={problem.placement_mode!r}, links={problem.links!r}; "
            "choose 'given' or 'plan', and 'free', 'queued' or 'shared'"
        )
    problem.cost.check_covers(problem.num_stages, 1 + max(max(nodes, default=0) for nodes in problem.placement))
    if problem.allreduce_s and len(problem.allreduce_s) != len(problem.placement):
        raise ValueError(f"allreduce_s has {len(problem.allreduce_s)} entries for {len(problem.placement)} stages")
    if not all(0 <= seconds < inf for seconds in problem.allreduce_s):
        raise ValueError(f"allreduce_s is {problem.allreduce_s}; seconds are finite and not negative")


def _check_placement(problem: PlanProblem) -> None:
    for stage, nodes in enumerate(problem.placement):
        if len(set(nodes)) != len(nodes) or any(node < 0 for node in nodes):
            raise ValueError(f"stage {stage} is placed on nodes {nodes}; name each node once, from 0 on")
    if problem.placement_mode == "plan":
        held = [node for nodes in problem.placement for node in nodes]
        if len(set(held)) != len(held):
            raise ValueError(
                "placement_mode='plan' needs one stage on each node, but a node holds two; use placement_mode='given'"
            )


def _check_caps(problem: PlanProblem) -> None:
    caps = problem.memory_caps
    if caps is None:
        return
    if len(caps) != problem.cost.num_ranks:
        raise ValueError(f"{len(caps)} memory caps for {problem.cost.num_ranks} nodes; give one per node")
    if problem.placement_mode == "plan":
        return
    for stage, nodes in enumerate(problem.placement):
        weak = [node for node in nodes if caps[node] < 1]
        if weak and (stage == DRIVER_STAGE or len(weak) == len(nodes)):
            raise ValueError(
                f"caps too small: stage {stage} is held by nodes {nodes}, and a memory cap of {caps[weak[0]]} on node "
                f"{weak[0]} admits no microbatch; raise it to 1 or more"
            )
