"""Improving the order of tasks on each node while the paths stay as they are.

Simulated annealing over the critical path: the step only becomes shorter when two tasks that follow each other on a
node without a pause, both critical, change places (van Laarhoven, Aarts and Lenstra 1992). Orders that hold more
than a cap or that deadlock are never accepted.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf, log

from skippipe_plugin.schedule.play import Chain, Machine, Played

_LAST_TEMPERATURE = 0.0003
"""As a share of the makespan, like the first one, `heat`."""


class Static:
    """Chains with a fixed order of tasks on each node: how long they take, and what makes them take so long."""

    def __init__(self, chains: Sequence[Chain], machine: Machine) -> None:
        self.length = len(chains[0].nodes)
        self.count = len(chains)
        self.machine = machine
        self.node = [node for chain in chains for node in chain.nodes]
        self.duration = [duration for chain in chains for duration in chain.durations_s]
        self.hop = [hop for chain in chains for hop in chain.hops_s]
        self.occupied = [occupied for chain in chains for occupied in chain.occupied_s]
        self.request = [request for chain in chains for request in chain.requests_s]
        self.tail = [tail for chain in chains for tail in chain.tails_s]
        loss_at = (self.length - 1) // 2
        self.change = [(at < loss_at) - (at > loss_at) for at in range(self.length)] * self.count
        self.ends: list[float] = []
        self.cause: list[int] = []

    def play(self, orders: Sequence[Sequence[int]]) -> float:
        """Return the makespan, `inf` for a deadlock; keep the ends and the critical predecessor of each task."""
        length, gap_s, contended = self.length, self.machine.gap_s, self.machine.contended_links
        node_of, duration, hop, tail = self.node, self.duration, self.hop, self.tail
        occupied, request = self.occupied, self.request
        total = len(node_of)
        arrival = [-1.0] * total
        for first in range(0, total, length):
            arrival[first] = 0.0
        ends, cause = [0.0] * total, [-1] * total
        cursor, free = [0] * len(orders), [0.0] * len(orders)
        waits_for = [order[0] if order else -1 for order in orders]
        links: dict[tuple[int, int], float] = {}
        stack = [node for node, order in enumerate(orders) if order]
        finish, left = 0.0, total
        while stack:
            node = stack.pop()
            order, at, now = orders[node], cursor[node], free[node]
            size = len(order)
            while at < size:
                task = order[at]
                arrived = arrival[task]
                if arrived < 0.0:
                    waits_for[node] = task
                    break
                if arrived >= now:
                    now = arrived
                    cause[task] = task - 1 if task % length else -1
                elif at:
                    cause[task] = order[at - 1]
                now += duration[task]
                ends[task] = now
                if now + tail[task] > finish:
                    finish = now + tail[task]
                following = task + 1
                if following % length:
                    other = node_of[following]
                    sent = now
                    if contended and other != node:
                        asked = ends[task - task % length] + request[task]
                        sent = max(now, links.get((node, other), 0.0), asked)
                        links[node, other] = sent + occupied[task]
                    arrival[following] = sent + hop[task]
                    if waits_for[other] == following and other != node:
                        waits_for[other] = -1
                        stack.append(other)
                now += gap_s
                at += 1
                left -= 1
            cursor[node], free[node] = at, now
        self.ends, self.cause = ends, cause
        return inf if left else finish

    def played(self, orders: list[list[int]]) -> Played:
        """Return the outcome of the orders."""
        finish = self.play(orders)
        finishes = [
            max(self.ends[task] + self.tail[task] for task in range(first, first + self.length))
            for first in range(0, len(self.node), self.length)
        ]
        return Played(finish, finishes, [list(order) for order in orders])

    def critical(self) -> list[int]:
        """Return the tasks of one critical path of the last play, the last first."""
        task = max(range(len(self.ends)), key=lambda task: self.ends[task] + self.tail[task])
        path = []
        while task >= 0:
            path.append(task)
            task = self.cause[task]
        return path

    def fits(self, order: Sequence[int], cap: float) -> bool:
        """Tell whether an order holds no more than its cap at any time."""
        held, change = 0, self.change
        for task in order:
            held += change[task]
            if held > cap:
                return False
        return True


def polish(
    chains: Sequence[Chain],
    machine: Machine,
    played: Played,
    *,
    plays: int,
    target_s: float,
    seed: int,
    heat: float = 0.01,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Played:
    """Return the best orders found from ``played`` in that many plays; stop early at ``target_s``."""
    static, chance = Static(chains, machine), random.Random(seed)
    orders = [list(order) for order in played.orders]
    place = {task: at for order in orders for at, task in enumerate(order)}
    now_s = static.play(orders)
    best_s, best = now_s, [list(order) for order in orders]
    moves = _moves(static, place)
    temperature = heat * now_s
    cooling = (_LAST_TEMPERATURE / heat) ** (1 / max(1, plays))
    for count in range(plays):
        if not moves or best_s <= target_s or (count % 64 == 0 and out_of_time()):
            break
        temperature *= cooling
        first, second = moves[int(chance.random() * len(moves))]
        node = static.node[first]
        order = orders[node]
        at = place[first]
        order[at], order[at + 1] = second, first
        rises = static.change[first] < static.change[second]
        new_s = inf if rises and not static.fits(order, machine.caps[node]) else static.play(orders)
        if new_s <= now_s or (new_s < inf and now_s - new_s > temperature * log(chance.random() + 1e-300)):
            now_s = new_s
            place[first], place[second] = at + 1, at
            moves = _moves(static, place)
            if now_s < best_s - 1e-9:
                best_s, best = now_s, [list(order) for order in orders]
        else:
            order[at], order[at + 1] = first, second
    return static.played(best)


def _moves(static: Static, place: dict[int, int]) -> list[tuple[int, int]]:
    """Return the pairs of neighbours in an order, (first, second), both critical and not of one microbatch."""
    path = static.critical()
    length, node = static.length, static.node
    return [
        (before, task)
        for task, before in pairwise(path)
        if node[task] == node[before] and task // length != before // length and place[task] == place[before] + 1
    ]
