"""What ranks measured, put together: links into a network, events into a timeline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..engine.control.answers import LinkCosts
from ..engine.ping import LinkCost, measure_links
from ..engine.transport import Transport
from ..schedule import Action, Event, NetworkCost, Schedule, Timeline, find_transfers
from .clocks import WorkerClocks
from .links import Links


def network_cost(costs: Iterable[LinkCost], size: int) -> NetworkCost:
    """Return the network of ``size`` ranks; links that nobody measured cost nothing."""
    latency = [[0.0] * size for _ in range(size)]
    bandwidth = [[math.inf] * size for _ in range(size)]
    for cost in costs:
        for a, b in ((cost.first, cost.second), (cost.second, cost.first)):
            latency[a][b], bandwidth[a][b] = cost.latency_s, cost.bandwidth_Bps
    return NetworkCost(tuple(map(tuple, latency)), tuple(map(tuple, bandwidth)))


def measured_network(transport: Transport, links: Links, num_bytes: int, size: int) -> NetworkCost:
    """Measure this rank's links with messages of ``num_bytes``, and put them together with what the workers did."""
    costs = measure_links(transport, num_bytes)
    for answer in links.expect_all(LinkCosts).values():
        costs += [LinkCost(*entry) for entry in answer.costs]
    return network_cost(costs, size)


Entry = tuple[str, float, float]
"""Action, start and end in seconds of a worker's clock."""


def measured_timeline(
    schedule: Schedule,
    events: Sequence[Event],
    remote: Mapping[int, Sequence[Entry]],
    clocks: WorkerClocks,
) -> Timeline:
    """Join the driver's events and those of the workers, as the driver's clock saw them; the first begins at 0.

    Args:
        schedule: What ran.
        events: The driver's own.
        remote: By rank: what that worker did.
        clocks: How far the workers' clocks are ahead.
    """
    joined = list(events)
    for rank, entries in remote.items():
        ahead_s = clocks.offset_s(rank)
        joined += [Event(rank, Action.parse(text), start - ahead_s, end - ahead_s) for text, start, end in entries]
    origin = min((event.start_s for event in joined), default=0.0)
    shifted = [Event(e.rank, e.action, e.start_s - origin, e.end_s - origin) for e in joined]
    shifted.sort(key=lambda event: (event.start_s, event.rank))
    return Timeline(tuple(shifted), find_transfers(schedule, shifted), "measured")
