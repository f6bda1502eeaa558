"""Playing paths quickly: the simulator that the planner's search runs many thousand times.

Plain lists of numbers and no objects; `simulate` says the same more slowly and for any schedule, and a test holds the
two together. A *chain* is one microbatch's tasks in order: forward on its driver and along its path, loss, backward
all the way back. Chains that are played together have equal lengths; a task is ``microbatch * length + position``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

BACKWARD_FIRST, FORWARD_FIRST, OLDEST_FIRST = -(10**6), 10**6, 0
"""Rules of `dispatch`: what is added to the age of a backward or a loss when it competes with a forward."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The tasks of one microbatch."""

    nodes: tuple[int, ...]
    durations_s: tuple[float, ...]
    hops_s: tuple[float, ...]
    """From the end of each task to the arrival of its result at the next one; the last is not used."""
    occupied_s: tuple[float, ...]
    """For how long each of these messages keeps the next one on its link waiting; the last is not used."""
    requests_s: tuple[float, ...]
    """From the end of the first task until each of these messages may leave; the last is not used."""
    tails_s: tuple[float, ...]
    """What must follow each task before the step is over, beyond the chain: gradients summed over replicas."""

    @property
    def costs(self) -> tuple[tuple[float, ...], ...]:
        """All seconds of the chain."""
        return self.durations_s, self.hops_s, self.occupied_s, self.requests_s, self.tails_s


@dataclass(frozen=True, slots=True)
class Machine:
    """What chains are played on."""

    caps: tuple[float, ...]
    """By node: the most microbatches between the start of their F and the end of their B there; `inf` for no cap."""
    gap_s: float = 0.0
    contended_links: bool = False
    """Whether messages on a directed link wait for each other, in the order they are sent."""


@dataclass(slots=True)
class Played:
    """The outcome of a play."""

    finish_s: float
    finishes_s: list[float]
    """By microbatch, tails included."""
    orders: list[list[int]] = field(default_factory=list)
    """By node: its tasks in the order it ran them."""


def dispatch(
    chains: Sequence[Chain],
    machine: Machine,
    rule: int = BACKWARD_FIRST,
    driver_rule: int | None = None,
    limit: float = inf,
) -> Played | None:
    """Let each node that is free start the most urgent task that has arrived and that its cap admits.

    Args:
        chains: By microbatch, the oldest first; the older is the more urgent.
        machine: What they run on.
        rule: Which of backward and forward is more urgent.
        driver_rule: The same on nodes where a microbatch begins; by default as elsewhere.
        limit: The most microbatches under way at once.

    Returns:
        What happened, or None where the caps lock up.
    """
    count, length = len(chains), len(chains[0].nodes)
    loss_at, num_nodes = (length - 1) // 2, len(machine.caps)
    bias = [rule] * num_nodes
    if driver_rule is not None:
        for chain in chains:
            bias[chain.nodes[0]] = driver_rule
    caps, gap_s, contended = machine.caps, machine.gap_s, machine.contended_links
    position, begun, finishes = [0] * count, [0.0] * count, [0.0] * count
    free, held, waking = [0.0] * num_nodes, [0] * num_nodes, [False] * num_nodes
    forwards: list[list[int]] = [[] for _ in range(num_nodes)]
    backwards: list[list[int]] = [[] for _ in range(num_nodes)]
    orders: list[list[int]] = [[] for _ in range(num_nodes)]
    links: dict[tuple[int, int], float] = {}
    events: list[tuple[float, int]] = []  # when, and the microbatch that arrives or count + the node that is free
    waiting = list(range(count - 1, -1, -1)) if limit < count else []
    for microbatch in range(count if limit >= count else int(limit)):
        first = chains[microbatch].nodes[0]
        heappush(forwards[first], waiting.pop() if waiting else microbatch)
        if not waking[first]:
            waking[first] = True
            heappush(events, (0.0, count + first))
    finish = 0.0
    while events:
        now, code = heappop(events)
        if code < count:
            node = chains[code].nodes[position[code]]
            heappush(forwards[node] if position[code] < loss_at else backwards[node], code)
            if free[node] > now:
                if not waking[node]:
                    waking[node] = True
                    heappush(events, (free[node], count + node))
                continue
        else:
            node = code - count
            waking[node] = False
            if free[node] > now:  # an arrival at the same moment came first
                if forwards[node] or backwards[node]:
                    waking[node] = True
                    heappush(events, (free[node], code))
                continue
        f, b = forwards[node], backwards[node]
        if b and (not f or held[node] >= caps[node] or b[0] + bias[node] <= f[0]):
            microbatch = heappop(b)
            at = position[microbatch]
            if at > loss_at:
                held[node] -= 1
        elif f and held[node] < caps[node]:
            microbatch = heappop(f)
            at = position[microbatch]
            held[node] += 1
        else:
            continue
        chain = chains[microbatch]
        orders[node].append(microbatch * length + at)
        end = now + chain.durations_s[at]
        free[node] = end + gap_s
        if end + chain.tails_s[at] > finishes[microbatch]:
            finishes[microbatch] = end + chain.tails_s[at]
            if finishes[microbatch] > finish:
                finish = finishes[microbatch]
        if not at:
            begun[microbatch] = end
        at += 1
        position[microbatch] = at
        if at < length:
            if contended and chain.nodes[at] != node:
                link = (node, chain.nodes[at])
                end = max(end, links.get(link, 0.0), begun[microbatch] + chain.requests_s[at - 1])
                links[link] = end + chain.occupied_s[at - 1]
            end += chain.hops_s[at - 1]
            heappush(events, (end, microbatch))
        elif waiting:
            admitted = waiting.pop()
            first = chains[admitted].nodes[0]
            heappush(forwards[first], admitted)
            if first != node and not waking[first]:
                waking[first] = True
                heappush(events, (max(now, free[first]), count + first))
        if (f or b) and not waking[node]:
            waking[node] = True
            heappush(events, (free[node], count + node))
    if any(at < length for at in position):
        return None
    return Played(finish, finishes, orders)


def dispatch_safely(chains: Sequence[Chain], machine: Machine, rule: int = BACKWARD_FIRST) -> Played | None:
    """Dispatch with fewer and fewer microbatches under way until the caps no longer lock up; None if they always do."""
    limit: float = inf
    while True:
        played = dispatch(chains, machine, rule, limit=limit)
        if played is not None or limit == 1:
            return played
        limit = max(1, min(limit, len(chains)) // 2)
