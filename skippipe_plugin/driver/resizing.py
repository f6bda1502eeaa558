"""How many stages the workers at hand make, who sits where, and which blocks move for it. Pure functions of numbers.

The mechanism that follows these decisions is :mod:`skippipe_plugin.driver.moving`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workforce:
    """The workers of a job between two steps."""

    staying: int
    """Those that hold stages and have not asked to leave."""
    leaving: int = 0
    """Those that hold stages and have asked to leave."""
    ready: int = 0
    """Those without stages that could take some over now, wherever they come from."""
    joined: int = 0
    """Those of the ready ones that joined by hand, to be used."""
    coming: int = 0
    """Those that are being started."""


def num_stages_for(workforce: Workforce, *, present: int, replicas: int, spares: int, most: int) -> int:
    """Return how many stages the workers should hold.

    It shrinks when workers leave and nobody is there, or on the way, to replace them; it grows by those that joined by
    hand and are not needed as replacements or spares. What the driver itself has ready is never a reason to grow.

    >>> num_stages_for(Workforce(staying=2, ready=2, joined=2), present=2, replicas=1, spares=1, most=8)
    3
    >>> num_stages_for(Workforce(staying=2, leaving=1), present=3, replicas=1, spares=0, most=8)
    2

    Args:
        workforce: Who is there.
        present: The number of their stages now.
        replicas: How many workers hold each stage.
        spares: How many workers shall be ready beside those that hold stages.
        most: The largest number of stages that can be made.

    Returns:
        At least 1 if there are some; ``present`` when nothing should change, also when only those that leave are left.
    """
    free = workforce.ready - workforce.leaving
    if free < 0:
        if workforce.coming:
            return present  # a replacement is on its way, and a leaver can wait that long
        return min(present, (workforce.staying + workforce.ready) // replicas) or present
    more = max(0, min(workforce.joined, free - spares)) // replicas
    return max(present, min(present + more, most))


def seats(held: Sequence[Collection[int]], wanted: Sequence[Collection[int]], weights: Sequence[float]) -> list[int]:
    """Choose a worker for each place such that as little as possible moves.

    >>> seats([{0, 1, 2}, {3, 4, 5}, ()], [{0, 1}, {2, 3}, {4, 5}], [1.0] * 6)
    [0, 2, 1]

    Args:
        held: By worker: the blocks it holds. At least as many workers as places.
        wanted: By place: the blocks that belong there.
        weights: By block: what moving it costs.

    Returns:
        By place: the number of its worker.
    """
    from scipy.optimize import linear_sum_assignment  # takes long to import, and is needed for moves only

    kept = [[sum(weights[block] for block in set(place) & set(blocks)) for blocks in held] for place in wanted]
    _, chosen = linear_sum_assignment(kept, maximize=True)
    return [int(worker) for worker in chosen]


def arrivals(held: Collection[int], wanted: Collection[int]) -> tuple[int, ...]:
    """Return the blocks that a worker lacks."""
    return tuple(sorted(set(wanted) - set(held)))


def carried_over(factors: Mapping[int, float], before: Sequence[range], after: Sequence[range]) -> dict[int, float]:
    """Give each new stage the mean over its blocks of what a factor was for their old stages.

    >>> carried_over({2: 1.5}, [range(0, 2), range(2, 4)], [range(0, 1), range(1, 3), range(3, 4)])
    {2: 1.25, 3: 1.5}

    Args:
        factors: By stage, from 1 on; 1 where there is none.
        before: By stage from 1 on: its blocks.
        after: The same for the new stages.
    """
    by_block = {block: factors.get(stage, 1.0) for stage, blocks in enumerate(before, start=1) for block in blocks}
    means = {stage: sum(map(by_block.__getitem__, blocks)) / len(blocks) for stage, blocks in enumerate(after, start=1)}
    return {stage: mean for stage, mean in means.items() if mean != 1.0}
