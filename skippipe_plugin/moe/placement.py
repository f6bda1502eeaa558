"""Which rank holds which expert: from loads and the costs of moving tokens, by a heuristic or exactly.

A placement is a tuple with the rank of each expert; every rank holds equally many experts, within one. What is
minimised is the busiest rank's load plus the cost of all transfers, in the same unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Placement = tuple[int, ...]

EXACT_UP_TO = 64
"""Experts up to which the exact solution is worth its time; beyond, it rarely beats the heuristic within seconds."""


def placement_cost(placement: Sequence[int], loads: Sequence[float], transfers: np.ndarray | None = None) -> float:
    """Return the busiest rank's load plus the transfers: ``max_r sum_e load + sum_e transfers[e, rank of e]``.

    >>> placement_cost((0, 1, 1), (5, 2, 1))
    5.0
    """
    ranks = np.asarray(placement)
    busiest = float(np.bincount(ranks, weights=np.asarray(loads, dtype=float)).max())
    return busiest + (0.0 if transfers is None else float(transfers[np.arange(len(ranks)), ranks].sum()))


def transfer_costs(
    moves: np.ndarray, previous: Sequence[int], cost_per_token: np.ndarray, tokens_from: np.ndarray | None = None
) -> np.ndarray:
    """Return what it costs to have each expert on each rank, given where the layer before has its experts.

    Following MoETuner (arXiv 2502.06643) and ExFlow (arXiv 2401.08383), which place experts that follow each other for
    the same tokens on near ranks.

    Args:
        moves: Tokens that go from an expert of the layer before to one of this layer, [experts before, experts].
        previous: The placement of the layer before.
        cost_per_token: Of a token between two ranks, [ranks, ranks].
        tokens_from: Tokens that each rank sends to each expert for other reasons, [ranks, experts].

    Returns:
        [experts, ranks]
    """
    by_rank = np.zeros((len(cost_per_token), moves.shape[1]))
    np.add.at(by_rank, np.asarray(previous), moves)
    if tokens_from is not None:
        by_rank = by_rank + tokens_from
    costs: np.ndarray = by_rank.T @ cost_per_token
    return costs


def place_experts(
    loads: Sequence[float], num_ranks: int, *, transfers: np.ndarray | None = None, time_limit_s: float = 5.0
) -> Placement:
    """Return a good placement: the exact one up to 64 experts if the solver ends in time, else the heuristic's.

    Raises:
        ValueError: Fewer experts than ranks, or loads or transfers that are negative, not finite or of the wrong shape.
    """
    heuristic = place_by_swaps(loads, num_ranks, transfers=transfers)
    if len(loads) > EXACT_UP_TO:
        return heuristic
    exact = place_exactly(loads, num_ranks, transfers=transfers, time_limit_s=time_limit_s)
    found = [heuristic] if exact is None else [heuristic, exact]
    return min(found, key=lambda placement: placement_cost(placement, loads, transfers))


def place_by_swaps(
    loads: Sequence[float],
    num_ranks: int,
    *,
    transfers: np.ndarray | None = None,
    start: Sequence[int] | None = None,
) -> Placement:
    """Place the heaviest expert first where it costs least, then swap pairs between ranks while that helps.

    With ``start`` pairs are swapped from that placement on, so that few experts change ranks.
    """
    weights, costs = _check(loads, num_ranks, transfers)
    placement = _heaviest_first(weights, costs, num_ranks) if start is None else np.array(start)
    while (swap := _best_swap(placement, weights, costs)) is not None:
        placement[list(swap)] = placement[list(swap)[::-1]]
    return tuple(int(rank) for rank in placement)


def _heaviest_first(weights: np.ndarray, costs: np.ndarray, num_ranks: int) -> np.ndarray:
    room = [len(part) for part in np.array_split(np.arange(len(weights)), num_ranks)]
    totals, placement = np.zeros(num_ranks), np.zeros(len(weights), dtype=int)
    for expert in np.argsort(-weights, kind="stable"):
        open_ranks = [rank for rank in range(num_ranks) if room[rank]]
        best = min(open_ranks, key=lambda rank: totals[rank] + costs[expert, rank])
        placement[expert] = best
        totals[best] += weights[expert]
        room[best] -= 1
    return placement


def _best_swap(placement: np.ndarray, loads: np.ndarray, transfers: np.ndarray) -> tuple[int, int] | None:
    """Return the pair on different ranks whose swap lowers the cost most, or None."""
    totals = np.bincount(placement, weights=loads, minlength=transfers.shape[1])
    here = transfers[np.arange(len(loads)), placement]
    best, best_gain = None, 1e-9 * (1.0 + totals.max())
    # Only a swap with the busiest rank lowers the maximum; any swap may lower the transfers.
    candidates = range(len(loads)) if transfers.any() else np.flatnonzero(placement == totals.argmax())
    for one in candidates:
        rank = placement[one]
        given, taken = totals[rank] + loads - loads[one], totals[placement] + loads[one] - loads
        busiest = np.maximum(np.maximum(given, taken), _busiest_besides(totals, rank)[placement])
        extra = transfers[one, placement] + transfers[:, rank] - here[one] - here
        gains = np.where(placement == rank, -np.inf, totals.max() - busiest - extra)
        other = int(gains.argmax())
        if gains[other] > best_gain:
            best, best_gain = (int(one), other), float(gains[other])
    return best


def _busiest_besides(totals: np.ndarray, rank: int) -> np.ndarray:
    """Return for each rank the largest total of the ranks that are neither it nor ``rank``."""
    others = totals.copy()
    others[rank] = -np.inf
    first = int(others.argmax())
    result = np.full(len(totals), others[first])
    others[first] = -np.inf
    result[first] = others.max()
    return result


def place_exactly(
    loads: Sequence[float], num_ranks: int, *, transfers: np.ndarray | None = None, time_limit_s: float = 60.0
) -> Placement | None:
    """Return a placement of least cost by integer programming (HiGHS), or None if the time was not enough for any.

    Variables ``x[expert, rank]`` in {0, 1} and the busiest load ``z``; every expert is at one rank, every rank holds
    its share of experts, and ``sum_e load_e x[e, r] <= z``. After the time limit the best placement so far is returned.
    """
    weights, costs = _check(loads, num_ranks, transfers)
    num_experts = len(weights)
    size = num_experts * num_ranks
    once, held, below = (
        np.zeros((num_experts, size + 1)),
        np.zeros((num_ranks, size + 1)),
        np.zeros((num_ranks, size + 1)),
    )
    for expert, rank in itertools.product(range(num_experts), range(num_ranks)):
        column = expert * num_ranks + rank
        once[expert, column] = held[rank, column] = 1
        below[rank, column] = weights[expert]
    below[:, size] = -1
    low, rest = divmod(num_experts, num_ranks)
    bounds = Bounds(np.zeros(size + 1), np.append(np.ones(size), np.inf))
    solution = milp(
        np.append(costs.reshape(-1), 1.0),
        integrality=np.append(np.ones(size), 0),
        bounds=bounds,
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(held, low, low + bool(rest)),
            LinearConstraint(below, -np.inf, 0),
        ],
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
    )
    if solution.x is None:
        return None
    return tuple(int(rank) for rank in solution.x[:size].reshape(num_experts, num_ranks).argmax(1))


def _check(loads: Sequence[float], num_ranks: int, transfers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(loads, dtype=float)
    if not 1 <= num_ranks <= len(values):
        raise ValueError(f"{len(values)} experts cannot be placed on {num_ranks} ranks; each needs at least one")
    costs = np.zeros((len(values), num_ranks)) if transfers is None else np.asarray(transfers, dtype=float)
    if costs.shape != (len(values), num_ranks):
        raise ValueError(f"transfers are {costs.shape}; [experts, ranks] is ({len(values)}, {num_ranks})")
    for name, array in (("loads", values), ("transfers", costs)):
        if not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(f"{name} must be finite and not negative")
    return values, costs
