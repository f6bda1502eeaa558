"""Whether experts should move between ranks, and which: measured loads and links against what a move costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from skippipe_plugin.moe.parallel import Placement
from skippipe_plugin.moe.placement import place_by_swaps, placement_cost

PASSES = 3.0
"""A step's work on a row in forwards: a backward is about two of them."""
JOURNEYS = 4
"""How often a row of a step travels: there and back, and its gradient too."""


@dataclass(frozen=True, slots=True)
class ExpertCosts:
    """What experts cost, as measured."""

    row_s: float
    """The forward of one row (a token at one expert), in seconds."""
    row_bytes: int
    """A row on its way."""
    expert_bytes: int
    """What moves with an expert: parameters, and the optimizer's state of them."""
    seconds_per_byte: np.ndarray
    """[ranks, ranks], of the links between the ranks that share experts."""


@dataclass(frozen=True, slots=True)
class Move:
    """A better placement for one layer."""

    placement: Placement
    num_moved: int
    saved_s: float
    """Per step, by the measured loads."""
    cost_s: float
    """Of the move, once."""


def plan_move(loads: Sequence[float], present: Placement, costs: ExpertCosts, steps: int) -> Move | None:
    """Return a placement to which moving pays within so many steps, or None.

    The busiest rank's compute and the transfers of all rows, in seconds of a step (the objective of
    :mod:`skippipe_plugin.moe.placement`), are lowered by swapping pairs of experts from the present placement on; so
    few experts move. Tokens are taken to come from all ranks alike.

    Args:
        loads: Rows of each expert in a step, over all ranks.
        present: Where the experts are.
        costs: What was measured.
        steps: How many steps the move may take to pay for itself.
    """
    size = len(costs.seconds_per_byte)
    compute = PASSES * costs.row_s * np.asarray(loads, dtype=float)
    transfers = _transfers(np.asarray(loads, dtype=float), costs, size)
    better = place_by_swaps(compute.tolist(), size, transfers=transfers, start=present)
    moved = [expert for expert, place in enumerate(better) if place != present[expert]]
    if not moved:
        return None
    saved_s = placement_cost(present, compute.tolist(), transfers) - placement_cost(better, compute.tolist(), transfers)
    cost_s = sum(costs.expert_bytes * costs.seconds_per_byte[present[each], better[each]] for each in moved)
    if saved_s * steps <= cost_s:
        return None
    return Move(better, len(moved), float(saved_s), float(cost_s))


def plan_moves(
    loads: Mapping[str, Sequence[float]], present: Mapping[str, Placement], costs: Mapping[str, ExpertCosts], steps: int
) -> dict[str, Move]:
    """Return the moves that pay, by layer."""
    found = {name: plan_move(each, present[name], costs[name], steps) for name, each in loads.items()}
    return {name: move for name, move in found.items() if move is not None}


def _transfers(loads: np.ndarray, costs: ExpertCosts, size: int) -> np.ndarray:
    """Return the seconds that each expert's rows travel in a step, by the rank that holds it: [experts, ranks]."""
    from_all = np.full((size,), 1.0 / size) @ np.where(np.eye(size, dtype=bool), 0.0, costs.seconds_per_byte)
    return np.outer(loads, from_all) * costs.row_bytes * JOURNEYS
