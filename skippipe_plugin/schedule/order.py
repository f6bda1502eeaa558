"""The list scheduler: turns any set of paths into an order of actions on each rank.

It plays the step on a cost model. Whenever a rank is free it starts the most urgent action whose input has arrived:
backward first, then loss, then forward, the oldest microbatch first within each. Caps on live activations hold
forwards back; 1F1B is nothing but caps by position, with each forward run as soon as its cap admits it. The result
is checked before it is returned.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from skippipe_plugin.schedule.cost import CostModel
from skippipe_plugin.schedule.ir import DRIVER_STAGE, Action, Op, Path, Schedule, ScheduleError, chain
from skippipe_plugin.schedule.validate import validate, validate_routes

ActivationCaps = Literal["position"] | Sequence[int] | None

_BACKWARD_FIRST = {Op.B: 0, Op.L: 1, Op.F: 2}
# Under caps by position a forward that the cap admits is due: the cap alternates the two, as 1F1B does. Backward first
# would let a rank drain that feeds several chains (a driver with a stage of its own) and then refill.
_ALTERNATING = {Op.L: 0, Op.F: 1, Op.B: 2}


def list_schedule(
    placement: Sequence[Sequence[int]],
    paths: Sequence[Path],
    *,
    cost: CostModel | None = None,
    activation_caps: ActivationCaps = None,
    driver_in_flight: int | None = None,
    backward: bool = True,
    name: str = "",
) -> Schedule:
    """Order the actions of any paths, full, partial or reordered, by playing them greedily.

    >>> paths = [Path.parse("0: 1@1 2@2")] * 2
    >>> schedule = list_schedule([[0], [1], [2]], paths, activation_caps="position")
    >>> " ".join(map(str, schedule.orders[2]))
    '2F0 2F1 2B0 2B1'

    Args:
        placement: By stage, the ranks that hold it; entry 0 is the drivers.
        paths: By microbatch. Their order is the order of age within a driver; drivers take turns.
        cost: What to play on; by default forward 1, backward 2 per stage, the rest free.
        activation_caps: What holds a forward of a block stage back. None: nothing. "position": a rank starts one
            only while it holds fewer activations than the ranks that follow on the path (itself and the drivers
            included, since the loss is theirs) outnumber those that share its position, rounded up: L + 1 - p on a
            path of length L without replicas, which is 1F1B over L + 1 positions.
            These caps bend where reordered paths would deadlock under them; they suit full paths, others run faster
            under ``driver_in_flight`` (twice the number of ranks is a good start). A sequence: the most
            (stage, microbatch) pairs that may live on each rank, the driver's stage 0 included; never exceeded.
        driver_in_flight: The most microbatches that a driver may have begun and not finished; None for no limit.
        backward: False for evaluation.
        name: The schedule's name.

    Returns:
        A schedule that `validate` accepts, under the caps if they are given by rank.

    Raises:
        ScheduleError: The placement or a path is not legal, or one microbatch alone exceeds a cap.
        ValueError: A limit has the wrong length or is below 1, or the cost model lacks a stage or rank.
    """
    num_ranks = 1 + max((rank for ranks in placement for rank in ranks), default=-1)
    _check_limits(num_ranks, activation_caps, driver_in_flight)
    schedule = Schedule(tuple(map(tuple, placement)), tuple(paths), ((),) * num_ranks, backward=backward, name=name)
    validate_routes(schedule)
    cost = cost or CostModel.uniform(schedule.num_stages, num_ranks)
    cost.check_covers(schedule.num_stages, num_ranks)
    schedule = replace(schedule, orders=_play_within(schedule, cost, activation_caps, driver_in_flight or inf))
    validate(schedule, memory_caps=None if isinstance(activation_caps, str) else activation_caps)
    return schedule


def turns(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Return the age of each microbatch: its place among its driver's, then its number. Smaller is older."""
    begun: dict[int, int] = {}
    ages: list[tuple[int, int]] = []
    for microbatch, path in enumerate(paths):
        ages.append((begun.setdefault(path.driver, 0), microbatch))
        begun[path.driver] += 1
    return ages


def position_cap(placement: Sequence[Sequence[int]], path: Path, position: int) -> int:
    """Return how many activations keep a rank at a position of a path busy: L + 1 - position without replicas.

    The loss is a position too, the last one: with one activation less the last stage would idle while its hidden
    states travel to the driver, the head and the loss are computed, and the gradient travels back.
    """
    widths = [len(placement[stage]) for stage in (*path.stages[position:], DRIVER_STAGE)]
    return -(-sum(widths) // widths[0])


def _check_limits(num_ranks: int, activation_caps: ActivationCaps, driver_in_flight: int | None) -> None:
    if driver_in_flight is not None and driver_in_flight < 1:
        raise ValueError(f"driver_in_flight is {driver_in_flight}; a driver needs at least 1 microbatch in flight")
    if isinstance(activation_caps, str):
        if activation_caps != "position":
            raise ValueError(f"activation_caps is {activation_caps!r}; use 'position', one cap per rank, or None")
    elif activation_caps is not None and len(activation_caps) != num_ranks:
        raise ValueError(f"{len(activation_caps)} activation caps for {num_ranks} ranks; give one per rank")


def _play_within(
    schedule: Schedule, cost: CostModel, caps: ActivationCaps, driver_in_flight: float
) -> tuple[tuple[Action, ...], ...]:
    """Play; if caps by rank lock up, play again with fewer microbatches under way, down to one."""
    under_way: float = inf
    while True:
        orders = _Play(schedule, cost, caps, driver_in_flight, under_way).run()
        if orders is not None:
            return orders
        if under_way == 1:
            raise ScheduleError(f"one microbatch alone holds more activations on a rank than the caps {caps} allow")
        under_way = max(1, min(under_way, schedule.num_microbatches) // 2)


@dataclass(slots=True)
class _Rank:
    """What a rank has ready, is doing and holds while it is played."""

    ready: list[tuple[int, tuple[int, int], Action]]
    order: list[Action]
    free_s: float = 0.0
    live: int = 0
    blocks_live: int = 0


class _Play:
    """One greedy play of a schedule's paths; `run` returns the orders, or None where caps by rank lock up."""

    def __init__(
        self,
        schedule: Schedule,
        cost: CostModel,
        caps: ActivationCaps,
        driver_in_flight: float,
        under_way: float,
    ) -> None:
        self.schedule = schedule
        self.cost = cost
        self.ages = turns(schedule.paths)
        self.driver_in_flight = driver_in_flight
        self.under_way = under_way
        self.chains = [chain(path, m, backward=schedule.backward) for m, path in enumerate(schedule.paths)]
        self.next = [0] * len(self.chains)
        self.queues = {driver: deque[int]() for driver in schedule.drivers}  # not begun yet, oldest first
        for microbatch, path in enumerate(schedule.paths):
            self.queues[path.driver].append(microbatch)
        self.ranks = [_Rank([], []) for _ in range(schedule.num_ranks)]
        self.begun = dict.fromkeys(schedule.drivers, 0)
        self.urgency = _ALTERNATING if isinstance(caps, str) else _BACKWARD_FIRST
        self.rank_caps = None if isinstance(caps, str) else caps
        self.position_caps = self._position_caps() if isinstance(caps, str) and schedule.backward else {}
        self.events: list[tuple[float, int]] = []  # when, and the microbatch that arrives, or -1: a rank is free

    def run(self) -> tuple[tuple[Action, ...], ...] | None:
        for driver in self.queues:
            self._offer_next(driver)
        now_s = 0.0
        while True:
            for rank in range(len(self.ranks)):
                # A free action on one rank may make another's choice better at the same instant.
                if not (self.events and self.events[0][0] == now_s):
                    self._start_one(rank, now_s)
            if self.events:
                now_s = self._advance()
            elif all(at == len(steps) for at, steps in zip(self.next, self.chains, strict=True)):
                return tuple(tuple(rank.order) for rank in self.ranks)
            elif not self._force(now_s):
                return None

    def _position_caps(self) -> dict[tuple[int, int], int]:
        placement, paths = self.schedule.placement, self.schedule.paths
        return {
            (visit.stage, microbatch): position_cap(placement, path, position)
            for microbatch, path in enumerate(paths)
            for position, visit in enumerate(path.visits)
        }

    def _offer_next(self, driver: int) -> None:
        """Make the driver's oldest microbatch that has not begun ready there."""
        if self.queues[driver]:
            self._arrive(self.queues[driver].popleft())

    def _arrive(self, microbatch: int) -> None:
        """Make the microbatch's next action ready on its rank."""
        action, rank = self.chains[microbatch][self.next[microbatch]]
        heapq.heappush(self.ranks[rank].ready, (self.urgency[action.op], self.ages[microbatch], action))

    def _advance(self) -> float:
        """Take all that happens at the next moment, and return that moment."""
        now_s = self.events[0][0]
        while self.events and self.events[0][0] == now_s:
            _, microbatch = heapq.heappop(self.events)
            if microbatch >= 0:
                self._arrive(microbatch)
        return now_s

    def _start_one(self, number: int, now_s: float) -> None:
        """Start the rank's most urgent action that nothing holds back, if it is free."""
        rank = self.ranks[number]
        if rank.free_s > now_s:
            return
        held = []
        while rank.ready:
            entry = heapq.heappop(rank.ready)
            if self._admits(entry[2], number):
                self._start(entry[2], number, now_s)
                break
            held.append(entry)
        for entry in held:
            heapq.heappush(rank.ready, entry)

    def _admits(self, action: Action, number: int) -> bool:
        if action.op is not Op.F:
            return True
        rank = self.ranks[number]
        if self.rank_caps is not None and rank.live >= self.rank_caps[number]:
            return False
        if action.stage == DRIVER_STAGE:
            return self.begun[number] < self.driver_in_flight and sum(self.begun.values()) < self.under_way
        return rank.blocks_live < self.position_caps.get((action.stage, action.microbatch), inf)

    def _start(self, action: Action, number: int, now_s: float) -> None:
        rank = self.ranks[number]
        rank.order.append(action)
        self._count(action, number)
        end_s = now_s + self.cost.action_s(action, number)
        rank.free_s = end_s + self.cost.compute.gap_s
        heapq.heappush(self.events, (rank.free_s, -1))
        self._send(action, number, end_s)
        if action.stage == DRIVER_STAGE and action.op is Op.F:
            self._offer_next(number)

    def _send(self, action: Action, number: int, end_s: float) -> None:
        """Let the action's result arrive at the next one of its chain."""
        steps, microbatch = self.chains[action.microbatch], action.microbatch
        self.next[microbatch] += 1
        if self.next[microbatch] < len(steps):
            consumer, target = steps[self.next[microbatch]]
            stage = action.stage if consumer.op in (Op.F, Op.L) else consumer.stage
            arrival_s = end_s + self.cost.message_s(number, target, stage)
            heapq.heappush(self.events, (arrival_s, microbatch))

    def _count(self, action: Action, number: int) -> None:
        """Keep the numbers of live activations and of microbatches under way."""
        last_op = Op.B if self.schedule.backward else (Op.L if action.stage == DRIVER_STAGE else Op.F)
        change = (action.op is Op.F) - (action.op is last_op)
        self.ranks[number].live += change
        if action.stage == DRIVER_STAGE:
            self.begun[number] += change
        else:
            self.ranks[number].blocks_live += change

    def _force(self, now_s: float) -> bool:
        """Nothing moves: start the oldest forward that only a cap by position holds back. False if there is none."""
        if self.rank_caps is not None:
            return False
        blocked = [
            (entry[1], number, entry)
            for number, rank in enumerate(self.ranks)
            for entry in rank.ready
            if entry[2].stage != DRIVER_STAGE
        ]
        _, number, entry = min(blocked)
        self.ranks[number].ready.remove(entry)
        heapq.heapify(self.ranks[number].ready)
        self._start(entry[2], number, now_s)
        return True
