"""The planner's search over paths and placement: simulated annealing in which every candidate is played.

A *unit* is a path that one or more microbatches of a driver share. The search starts with few, large units (a driver
with nodes of its own is a strong plan, and quickly found) and splits them later. Drivers that share no node do not
influence each other, so a move costs a play of the drivers that it touches only.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, inf

from skippipe_plugin.schedule.play import BACKWARD_FIRST, FORWARD_FIRST, Chain, Played, dispatch, dispatch_safely
from skippipe_plugin.schedule.polish import Static
from skippipe_plugin.schedule.problem import Instance

_LAST_TEMPERATURE = 0.001
"""As a share of the energy, like the first one, `heat`."""
_MEAN_WEIGHT = 0.3
"""What the mean of the drivers' times counts beside the longest: a move that helps another driver is still a gain."""

Unit = tuple[int, tuple[int, ...], tuple[int, ...]]
"""The driver's place in the list of drivers, the stages and the nodes of a path."""


@dataclass(frozen=True, slots=True)
class State:
    """Which node holds what, and the units' paths."""

    holders: tuple[tuple[int, ...], ...]
    """By stage; entry 0 is the drivers."""
    units: tuple[Unit, ...]
    """By driver, then by age; all stand for equally many microbatches, in which the driver's units take turns."""


@dataclass(slots=True)
class Clock:
    """What is left of the budget: work in tasks played, and a time that ends it all."""

    work: float
    is_late: Callable[[], bool]
    spent: float = 0.0
    late: bool = False

    def over(self, share_end: float = inf) -> bool:
        """Tell whether that much work, or all of it, is spent, or the time is."""
        if not self.late:
            self.late = self.is_late()
        return self.late or self.spent >= min(self.work, share_end)


class Evaluator:
    """Plays states, each group of drivers that share nodes once."""

    def __init__(self, instance: Instance, clock: Clock) -> None:
        self.instance = instance
        self.clock = clock
        self.per_driver = instance.problem.microbatches_per_driver
        self._known: dict[object, tuple[float, ...]] = {}

    def groups(self, state: State) -> list[list[int]]:
        """Return the drivers, by place, that share nodes with each other."""
        group_of: dict[int, list[int]] = {}
        touched: dict[int, int] = {}
        for place, node in enumerate(state.holders[0]):
            group_of[place] = [place]
            touched[node] = place
        for place, _, nodes in state.units:
            for node in nodes:
                other = touched.setdefault(node, place)
                mine, theirs = group_of[place], group_of[other]
                if mine is not theirs:
                    mine += theirs
                    for moved in theirs:
                        group_of[moved] = mine
        return [sorted(group) for place, group in group_of.items() if place == min(group)]

    def chains(self, state: State, group: Sequence[int]) -> list[Chain]:
        """Return the chains of the group's microbatches, the oldest of each driver first, drivers taking turns."""
        each = self.per_driver * len(state.holders[0]) // len(state.units)
        chain, drivers = self.instance.chain, state.holders[0]
        columns = []
        for place in group:
            own = [chain(drivers[place], unit[1], unit[2]) for unit in state.units if unit[0] == place]
            columns.append(own * each)
        return [c for row in zip(*columns, strict=True) for c in row]

    def times_s(self, state: State) -> list[float]:
        """Return by driver when its microbatches are done."""
        times = [0.0] * len(state.holders[0])
        for group in self.groups(state):
            chains = self.chains(state, group)
            for place, time in zip(group, self._group_times(chains, len(group)), strict=True):
                times[place] = time
        return times

    def energy(self, state: State) -> float:
        """Return what the search minimises."""
        times = self.times_s(state)
        longest = max(times)
        if longest == inf or longest == 0:
            return longest
        return longest + _MEAN_WEIGHT * sum(times) / len(times)

    def _group_times(self, chains: list[Chain], size: int) -> tuple[float, ...]:
        key: object = tuple(map(id, chains))
        known = self._known.get(key)
        if known is None and size == 1 and chains.count(chains[0]) == len(chains):
            caps = self.instance.machine.caps
            one = chains[0]
            # Nodes that cost the same give the same time, whichever they are.
            alike = (one.costs, tuple(caps[node] for node in one.nodes))
            if len(set(one.nodes)) * 2 + 1 == len(one.nodes):
                known = self._known.get(alike)
                if known is None:
                    known = self._known[alike] = self._play(chains, size)
        if known is None:
            known = self._play(chains, size)
        self._known[key] = known
        return known

    def _play(self, chains: list[Chain], size: int) -> tuple[float, ...]:
        machine = self.instance.machine
        self.clock.spent += len(chains) * len(chains[0].nodes)
        played = dispatch(chains, machine, BACKWARD_FIRST, FORWARD_FIRST) or dispatch_safely(chains, machine)
        if played is None:
            return (inf,) * size
        return tuple(max(played.finishes_s[place::size]) for place in range(size))

    def best_play(self, chains: list[Chain]) -> Played | None:
        """Return the best of all rules' plays, None where the caps lock up whatever is done."""
        machine = self.instance.machine
        self.clock.spent += 4 * len(chains) * len(chains[0].nodes)
        rules = (BACKWARD_FIRST, FORWARD_FIRST)
        outcomes = [dispatch(chains, machine, rule, driver_rule) for rule in rules for driver_rule in rules]
        finished = [played for played in outcomes if played is not None]
        if not finished:
            cautious = dispatch_safely(chains, machine)
            return cautious and Static(chains, machine).played(cautious.orders)
        return min(finished, key=lambda played: played.finish_s)


class PathSearch:
    """Anneals a state; `run` may be called again on what it returned, or on a split of it."""

    def __init__(self, evaluator: Evaluator, seed: int, tied: frozenset[int] = frozenset()) -> None:
        self.evaluator = evaluator
        self.tied = tied
        """The stages among which odd visits may move."""
        self.problem = evaluator.instance.problem
        self.chance = random.Random(seed)
        self._held = sorted(node for nodes in self.problem.placement for node in nodes)
        self._legal: dict[tuple[int, ...], bool] = {}

    def run(self, state: State, work: float, *, target_s: float, heat: float) -> State:
        """Return the best state that was met with that much work."""
        evaluator, clock, chance = self.evaluator, self.evaluator.clock, self.chance
        begun, end = clock.spent, clock.spent + work
        now = best = evaluator.energy(state)
        best_state = state
        moves = self._moves()
        while not clock.over(end) and best > target_s * (1 + _MEAN_WEIGHT):
            clock.spent += 3
            share = (clock.spent - begun) / work
            temperature = heat * (_LAST_TEMPERATURE / heat) ** share * best
            changed = moves[int(chance.random() * len(moves))](state)
            if changed is None:
                continue
            clock.spent += 25
            new = evaluator.energy(changed)
            if new <= now or (temperature > 0 and new < inf and chance.random() < exp((now - new) / temperature)):
                state, now = changed, new
                if now < best - 1e-12:
                    best, best_state = now, state
        return best_state

    def _moves(self) -> list[Callable[[State], State | None]]:
        moves: list[Callable[[State], State | None]] = [self._other_node, self._exchange_nodes, self._exchange_paths]
        moves += [self._reorder, self._exchange_stages, self._exchange_stages]
        if self.tied:
            moves += [self._other_stage] * 2
        if self.problem.placement_mode == "plan":
            moves += [self._exchange_roles] * 5
        return moves

    def _is_legal(self, stages: tuple[int, ...]) -> bool:
        if stages not in self._legal:
            self._legal[stages] = self.problem.constraints.why_illegal(stages, self.problem.num_stages) is None
        return self._legal[stages]

    def _pick(self, count: int) -> int:
        return int(self.chance.random() * count)

    def _with(self, state: State, *changes: tuple[int, Unit]) -> State:
        units = list(state.units)
        for at, unit in changes:
            units[at] = unit
        return State(state.holders, tuple(units))

    def _other_node(self, state: State) -> State | None:
        """Let one unit visit one of its stages on another node."""
        at = self._pick(len(state.units))
        place, stages, nodes = state.units[at]
        step = self._pick(len(nodes))
        holders = state.holders[stages[step]]
        node = holders[self._pick(len(holders))]
        if node == nodes[step] or self.evaluator.instance.machine.caps[node] < 1:
            return None
        return self._with(state, (at, (place, stages, (*nodes[:step], node, *nodes[step + 1 :]))))

    def _other_stage(self, state: State) -> State | None:
        """Let one unit visit another stage, if one is visited once more and the other once less than they could be."""
        at = self._pick(len(state.units))
        place, stages, nodes = state.units[at]
        out, stage = self._pick(len(stages)), self.chance.choice(sorted(self.tied))
        if stages[out] not in self.tied or stage in stages:
            return None
        visits = [sum(wanted in unit[1] for unit in state.units) for wanted in (stages[out], stage)]
        if visits[0] != visits[1] + 1:
            return None
        holders = state.holders[stage]
        new = self._insert(stages, nodes, out, stage, holders[self._pick(len(holders))])
        return new and self._with(state, (at, (place, *new)))

    def _exchange_nodes(self, state: State) -> State | None:
        """Let two units exchange the nodes on which they visit the same stage."""
        first, second = self._pick(len(state.units)), self._pick(len(state.units))
        (a, a_stages, a_nodes), (b, b_stages, b_nodes) = state.units[first], state.units[second]
        step = self._pick(len(a_stages))
        if a_stages[step] not in b_stages:
            return None
        other = b_stages.index(a_stages[step])
        if a_nodes[step] == b_nodes[other]:
            return None
        a_new = (*a_nodes[:step], b_nodes[other], *a_nodes[step + 1 :])
        b_new = (*b_nodes[:other], a_nodes[step], *b_nodes[other + 1 :])
        return self._with(state, (first, (a, a_stages, a_new)), (second, (b, b_stages, b_new)))

    def _exchange_stages(self, state: State) -> State | None:
        """Let two units exchange one visit each, of stages that the other does not visit."""
        first, second = self._pick(len(state.units)), self._pick(len(state.units))
        (a, a_stages, a_nodes), (b, b_stages, b_nodes) = state.units[first], state.units[second]
        i, j = self._pick(len(a_stages)), self._pick(len(b_stages))
        if a_stages[i] in b_stages or b_stages[j] in a_stages:
            return None
        a_new = self._insert(a_stages, a_nodes, i, b_stages[j], b_nodes[j])
        b_new = self._insert(b_stages, b_nodes, j, a_stages[i], a_nodes[i])
        if a_new is None or b_new is None:
            return None
        return self._with(state, (first, (a, *a_new)), (second, (b, *b_new)))

    def _insert(
        self, stages: tuple[int, ...], nodes: tuple[int, ...], out: int, stage: int, node: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Replace the visit at ``out``, and put the new one at a random place where it is legal."""
        rest, hosts = stages[:out] + stages[out + 1 :], nodes[:out] + nodes[out + 1 :]
        places = list(range(len(stages)))
        self.chance.shuffle(places)
        for at in places:
            new = (*rest[:at], stage, *rest[at:])
            if self._is_legal(new):
                return new, (*hosts[:at], node, *hosts[at:])
        return None

    def _reorder(self, state: State) -> State | None:
        """Let one unit visit two of its stages in the opposite order."""
        at = self._pick(len(state.units))
        place, stages, nodes = state.units[at]
        i, j = self._pick(len(stages)), self._pick(len(stages))
        order = list(range(len(stages)))
        order[i], order[j] = order[j], order[i]
        new = tuple(stages[k] for k in order)
        if i == j or not self._is_legal(new):
            return None
        return self._with(state, (at, (place, new, tuple(nodes[k] for k in order))))

    def _exchange_paths(self, state: State) -> State | None:
        """Exchange the paths of two units."""
        first, second = self._pick(len(state.units)), self._pick(len(state.units))
        a, b = state.units[first], state.units[second]
        if a[1:] == b[1:]:
            return None
        return self._with(state, (first, (a[0], *b[1:])), (second, (b[0], *a[1:])))

    def _exchange_roles(self, state: State) -> State | None:
        """Let two nodes exchange all they do."""
        a, b = self.chance.choice(self._held), self.chance.choice(self._held)
        if a == b:
            return None
        swap = list(range(self.evaluator.instance.num_nodes))
        swap[a], swap[b] = b, a
        holders = tuple(tuple(swap[node] for node in nodes) for nodes in state.holders)
        units = tuple(
            (place, stages, tuple([swap[node] for node in nodes]) if a in nodes or b in nodes else nodes)
            for place, stages, nodes in state.units
        )
        return State(holders, units)
