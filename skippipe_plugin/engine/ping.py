"""Measure latency and bandwidth between every two ranks of a generation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from .device import synchronize
from .transport import TensorSpec, Transport

_SMALL: Final = TensorSpec((1,), torch.uint8)
_REPEATS: Final = 3
_FIRST_TAG: Final = 1 << 30
"""Above the tags of any schedule."""


@dataclass(frozen=True, slots=True)
class LinkCost:
    """What a message between two ranks costs; taken to be the same in both directions."""

    first: int
    second: int
    latency_s: float
    """Seconds for an empty message, one way."""
    bandwidth_Bps: float
    """Bytes per second beyond the latency."""


def rounds(size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of disjoint pairs in which each two of ``size`` ranks meet once (the circle method).

    >>> list(rounds(3))
    [[(1, 2)], [(0, 2)], [(0, 1)]]
    """
    seats: list[int | None] = list(range(size)) + [None] * (size % 2)
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield sorted((min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None)
        seats = [seats[0], seats[-1], *seats[1:-1]]


def measure_links(transport: Transport, num_bytes: int) -> list[LinkCost]:
    """Exchange messages with every other rank; return the costs of the links this rank initiates.

    Every rank of the generation calls this at the same point. Of a pair, the lower rank measures: the median of a few
    round trips with one byte, then with ``num_bytes``, from where one computes to where the other does.
    """
    costs = []
    members = transport.members
    for number, seats in enumerate(rounds(len(members))):
        tag, pairs = _FIRST_TAG + 2 * number, [(members[a], members[b]) for a, b in seats]
        fresh = transport.connect([*pairs, *((second, first) for first, second in pairs)])
        for first, second in pairs:
            if transport.rank == first:
                costs.append(_measure(transport, second, tag, num_bytes))
            elif transport.rank == second:
                _echo(transport, first, tag, num_bytes)
        transport.disconnect(fresh)
    return costs


def _measure(transport: Transport, peer: int, tag: int, num_bytes: int) -> LinkCost:
    large = TensorSpec((num_bytes,), torch.uint8)
    _round_trip_s(transport, peer, tag, _SMALL)  # the first one waits until the peer is there
    latency = _median_trip_s(transport, peer, tag, _SMALL) / 2
    _round_trip_s(transport, peer, tag, large)  # and the first large one for the connection's window to open
    transfer = max(_median_trip_s(transport, peer, tag, large) / 2 - latency, 1e-9)
    return LinkCost(transport.rank, peer, latency, num_bytes / transfer)


def _median_trip_s(transport: Transport, peer: int, tag: int, spec: TensorSpec) -> float:
    return statistics.median(_round_trip_s(transport, peer, tag, spec) for _ in range(_REPEATS))


def _round_trip_s(transport: Transport, peer: int, tag: int, spec: TensorSpec) -> float:
    device = transport.device
    message = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    back = transport.receive(spec, peer, tag + 1, device) if transport.posts_ahead else None
    synchronize(device)
    start = time.perf_counter()
    transport.send(message, peer, tag)
    (back or transport.receive(spec, peer, tag + 1, device)).wait()
    transport.flush()
    synchronize(device)
    return time.perf_counter() - start


def _echo(transport: Transport, peer: int, tag: int, num_bytes: int) -> None:
    large = TensorSpec((num_bytes,), torch.uint8)
    specs = [_SMALL] * (1 + _REPEATS) + [large] * (1 + _REPEATS)
    receives = (transport.receive(spec, peer, tag, transport.device) for spec in specs)
    for pending in [*receives] if transport.posts_ahead else receives:
        transport.send(pending.wait(), peer, tag + 1)
