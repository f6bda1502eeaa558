"""From a measured timeline back to what stands behind it: the messages' travels, and a cost model.

The engine notes when actions ran, not when messages arrived. Both functions read arrivals off the actions: an action
that its rank was free for had waited for its message, so the message arrived as it began.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from statistics import median

from skippipe_plugin.schedule.cost import INPUT_SHARE, ComputeCost, CostModel, NetworkCost
from skippipe_plugin.schedule.ir import DRIVER_STAGE, Action, Message, Op, Schedule, messages
from skippipe_plugin.schedule.timeline import Event, Timeline, Transfer

Link = tuple[int, int]

_WAITING_SHARE = 1 / 8
"""An idle time of at least this share of a message's travel is waiting for it, a shorter one a pause."""


def find_transfers(schedule: Schedule, events: Iterable[Event]) -> tuple[Transfer, ...]:
    """Return the messages of a measured step.

    A message leaves when its producer ends. If its consumer waited for it, it arrived as the consumer began; else its
    travel is not known exactly, and the link's usual time stands in for it where that is shorter. Messages whose
    producer or consumer was not measured are left out.
    """
    hops = list(_hops(schedule, events))
    usual_s = _usual_s(hops)
    return tuple(_transfer(hop, usual_s[hop.link]) for hop in hops)


def fit_costs(timeline: Timeline, schedule: Schedule) -> CostModel:
    """Return the cost model under which the simulator comes closest to a measured timeline of ``schedule``.

    Medians of what was measured: forward and backward of each stage, loss, pause between actions, and the seconds of
    a message on each link, whatever its size. What was never seen (a stage that nobody visited, an unused link) gets
    the median of its kind; what nothing is known about costs nothing.

    >>> from skippipe_plugin.schedule import full_schedule, simulate
    >>> schedule = full_schedule("1f1b", num_stages=2, num_microbatches=4)
    >>> cost = fit_costs(simulate(schedule, CostModel.uniform(2, 3, latency_s=0.25)), schedule)
    >>> cost.compute.forward_s, cost.message_s(0, 1)
    ((0.0, 1.0, 1.0), 0.25)

    Raises:
        ValueError: The timeline holds no event.
    """
    if not timeline.events:
        raise ValueError("a timeline without events says nothing about costs; record a step that calls the blocks")
    pause_s = gap_s(timeline, schedule)
    compute = fit_compute(timeline.events, schedule.num_stages, schedule.num_ranks, pause_s)
    return CostModel(compute, _network(schedule, timeline.events), 0)


def fit_compute(events: Iterable[Event], num_stages: int, num_ranks: int, gap_s: float) -> ComputeCost:
    """Return the compute profile that is nearest to the durations of some events, by their medians."""
    events = list(events)
    factors = _rank_factors(events, num_ranks)
    medians = _medians(events, factors)
    forward = {stage: value for (stage, op), value in medians.items() if op is Op.F}
    backward = dict(_backwards(medians, num_stages))
    return ComputeCost(
        _by_stage(forward, num_stages),
        _by_stage(backward, num_stages),
        medians.get((DRIVER_STAGE, Op.L), 0.0),
        input_share=_input_share(medians),
        rank_factor=tuple(factors[rank] for rank in range(num_ranks)),
        gap_s=gap_s,
    )


def ran_whole(timeline: Timeline, schedule: Schedule) -> bool:
    """Tell whether the ranks of a timeline ran all their actions of the schedule; a short last batch does not."""
    measured = set(timeline.ranks)
    wanted = {(rank, action) for rank, order in enumerate(schedule.orders) if rank in measured for action in order}
    return bool(measured) and {(event.rank, event.action) for event in timeline.events} == wanted


def awaited_s(timeline: Timeline, schedule: Schedule) -> dict[Link, float]:
    """Return by link the median seconds of the messages that were waited for, which alone show what a link takes."""
    seconds: dict[Link, list[float]] = defaultdict(list)
    for hop in _hops(schedule, timeline.events):
        if hop.waited:
            seconds[hop.link].append(hop.travel_s)
    return {link: median(values) for link, values in seconds.items()}


@dataclass(frozen=True, slots=True)
class _Hop:
    """One message between two measured actions."""

    link: Link
    action: Action
    start_s: float
    travel_s: float
    """Seconds to the start of the consumer: an upper bound, and exact if it waited."""
    waited: bool


def _hops(schedule: Schedule, events: Iterable[Event]) -> Iterator[_Hop]:
    events = list(events)
    measured = {(event.rank, event.action): event for event in events}
    free_s = _free_since(events)
    for message in messages(schedule):
        producer = measured.get((message.source, message.producer))
        consumer = measured.get((message.destination, message.consumer))
        if producer is not None and consumer is not None and consumer.start_s >= producer.start_s:
            yield _hop(message, producer, consumer, free_s[message.destination, message.consumer])


def _hop(message: Message, producer: Event, consumer: Event, free_s: float) -> _Hop:
    # The send is the last part of its action: the consumer may have begun before the producer's clock stopped.
    start_s = min(producer.end_s, consumer.start_s)
    travel_s = consumer.start_s - start_s
    # A rank that became free just before its next action only paused; one that idled for long awaited the message.
    waited = free_s <= start_s or consumer.start_s - free_s >= travel_s * _WAITING_SHARE
    return _Hop((message.source, message.destination), message.producer, start_s, travel_s, waited)


def _transfer(hop: _Hop, usual_s: float) -> Transfer:
    travel_s = hop.travel_s if hop.waited else min(hop.travel_s, usual_s)
    return Transfer(*hop.link, hop.action, hop.start_s, hop.start_s + travel_s)


def _free_since(events: Iterable[Event]) -> dict[tuple[int, Action], float]:
    """Map each action on its rank to the end of the action before it there; minus infinity for the first."""
    result: dict[tuple[int, Action], float] = {}
    for order in _by_rank(events).values():
        result[order[0].rank, order[0].action] = -inf
        result |= {(event.rank, event.action): before.end_s for before, event in pairwise(order)}
    return result


def _by_rank(events: Iterable[Event]) -> dict[int, list[Event]]:
    orders: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.start_s, event.end_s)):
        orders[event.rank].append(event)
    return orders


def _usual_s(hops: Iterable[_Hop]) -> dict[Link, float]:
    """The seconds of a message by link: the median of those that were waited for.

    Where none was, the tightest of the upper bounds, and not more than the links that are known.
    """
    links: dict[Link, list[_Hop]] = defaultdict(list)
    for hop in hops:
        links[hop.link].append(hop)
    waited = {link: [hop.travel_s for hop in of_link if hop.waited] for link, of_link in links.items()}
    known = {link: median(values) for link, values in waited.items() if values}
    most_s = median(known.values()) if known else inf
    bounds = {link: min(most_s, *(hop.travel_s for hop in of_link)) for link, of_link in links.items()}
    return bounds | known


def _network(schedule: Schedule, events: Iterable[Event]) -> NetworkCost:
    usual_s = _usual_s(_hops(schedule, events))
    unknown_s = median(usual_s.values()) if usual_s else 0.0
    ranks = range(schedule.num_ranks)
    latency_s = tuple(tuple(0.0 if a == b else usual_s.get((a, b), unknown_s) for b in ranks) for a in ranks)
    return NetworkCost(latency_s, tuple((inf,) * len(ranks) for _ in ranks))


def _rank_factors(events: Iterable[Event], num_ranks: int) -> dict[int, float]:
    """How much slower each rank is than the others at what it shares with them (replicas, drivers); 1 alone."""
    durations: dict[tuple[int, Op], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        durations[event.action.stage, event.action.op][event.rank].append(event.duration_s)
    ratios: dict[int, list[float]] = defaultdict(list)
    for by_rank in durations.values():
        own = {rank: median(values) for rank, values in by_rank.items()}
        usual = median(own.values())
        for rank, value in own.items():
            if len(own) > 1 and usual > 0:
                ratios[rank].append(value / usual)
    return {rank: median(ratios[rank]) if ratios[rank] else 1.0 for rank in range(num_ranks)}


def _medians(events: Iterable[Event], factors: Mapping[int, float]) -> dict[tuple[int, Op], float]:
    """Seconds of each (stage, op) on a rank of factor 1."""
    seconds: dict[tuple[int, Op], list[float]] = defaultdict(list)
    for event in events:
        seconds[event.action.stage, event.action.op].append(event.duration_s / (factors[event.rank] or 1.0))
    return {key: median(values) for key, values in seconds.items()}


def _backwards(medians: Mapping[tuple[int, Op], float], num_stages: int) -> Iterator[tuple[int, float]]:
    for stage in range(num_stages + 1):
        halves = [medians[stage, op] for op in (Op.I, Op.W) if (stage, op) in medians]
        if (stage, Op.B) in medians:
            yield stage, medians[stage, Op.B]
        elif halves:
            yield stage, sum(halves)


def _input_share(medians: Mapping[tuple[int, Op], float]) -> float:
    inputs = sum(value for (_, op), value in medians.items() if op is Op.I)
    weights = sum(value for (_, op), value in medians.items() if op is Op.W)
    return inputs / (inputs + weights) if inputs and weights else INPUT_SHARE


def _by_stage(seconds: Mapping[int, float], num_stages: int) -> tuple[float, ...]:
    blocks = [value for stage, value in seconds.items() if stage != DRIVER_STAGE]
    unknown_s = median(blocks) if blocks else 0.0
    return (seconds.get(DRIVER_STAGE, 0.0), *(seconds.get(stage, unknown_s) for stage in range(1, num_stages + 1)))


def gap_s(timeline: Timeline, schedule: Schedule) -> float:
    """Return the median pause before actions that await no message; without any, the shortest between two actions."""
    awaits = {(message.destination, message.consumer) for message in messages(schedule)}
    pauses: list[float] = []
    free: list[float] = []
    for order in _by_rank(timeline.events).values():
        for before, event in pairwise(order):
            pause_s = max(0.0, event.start_s - before.end_s)
            pauses.append(pause_s)
            if (event.rank, event.action) not in awaits:
                free.append(pause_s)
    return median(free) if free else min(pauses, default=0.0)
