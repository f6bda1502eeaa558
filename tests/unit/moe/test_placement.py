"""Placements against brute force."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from skippipe_plugin.moe.placement import (
    place_by_swaps,
    place_exactly,
    place_experts,
    placement_cost,
    transfer_costs,
)


def all_placements(num_experts: int, num_ranks: int):
    """Every placement whose ranks hold equally many experts, within one."""
    low, rest = divmod(num_experts, num_ranks)
    for placement in itertools.product(range(num_ranks), repeat=num_experts):
        counts = np.bincount(placement, minlength=num_ranks)
        if counts.min() >= low and counts.max() <= low + bool(rest):
            yield placement


def brute_force(loads, num_ranks, transfers=None) -> float:
    return min(placement_cost(each, loads, transfers) for each in all_placements(len(loads), num_ranks))


def cost_by_hand(placement, loads, transfers) -> float:
    ranks = set(placement)
    busiest = max(sum(load for load, at in zip(loads, placement, strict=True) if at == rank) for rank in ranks)
    return busiest + sum(transfers[expert][rank] for expert, rank in enumerate(placement))


cases = st.integers(2, 3).flatmap(
    lambda num_ranks: st.tuples(
        st.just(num_ranks),
        st.lists(st.integers(0, 100), min_size=num_ranks, max_size=7),
        st.integers(0, 1000),
        st.booleans(),
    )
)


@settings(max_examples=40)
@given(cases)
def test_the_integer_program_is_optimal(case) -> None:
    num_ranks, loads, seed, coupled = case
    transfers = np.random.default_rng(seed).integers(0, 40, (len(loads), num_ranks)).astype(float) if coupled else None
    exact = place_exactly(loads, num_ranks, transfers=transfers)
    assert exact is not None
    assert exact in set(all_placements(len(loads), num_ranks))
    assert placement_cost(exact, loads, transfers) == pytest.approx(brute_force(loads, num_ranks, transfers))


@settings(max_examples=60)
@given(cases)
def test_swaps_are_legal_and_cannot_be_improved_by_one_swap(case) -> None:
    num_ranks, loads, seed, coupled = case
    transfers = np.random.default_rng(seed).integers(0, 40, (len(loads), num_ranks)).astype(float) if coupled else None
    placement = place_by_swaps(loads, num_ranks, transfers=transfers)
    counts = np.bincount(placement, minlength=num_ranks)
    assert counts.max() - counts.min() <= 1
    cost = placement_cost(placement, loads, transfers)
    for one, other in itertools.combinations(range(len(loads)), 2):
        swapped = list(placement)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        assert placement_cost(swapped, loads, transfers) >= cost - 1e-6


@given(cases)
def test_costs_by_hand(case) -> None:
    num_ranks, loads, seed, _ = case
    generator = np.random.default_rng(seed)
    transfers = generator.random((len(loads), num_ranks))
    placement = tuple(generator.integers(0, num_ranks, len(loads)))
    assert placement_cost(placement, loads, transfers) == pytest.approx(cost_by_hand(placement, loads, transfers))


def test_transfers_are_counted_token_by_token() -> None:
    generator = np.random.default_rng(0)
    moves, links = generator.integers(0, 9, (6, 4)), generator.random((3, 3))
    previous, placement = (0, 1, 2, 0, 1, 2), (2, 0, 1, 0)
    expected = sum(
        moves[before, after] * links[previous[before], placement[after]] for before in range(6) for after in range(4)
    )
    costs = transfer_costs(moves, previous, links)
    assert costs.shape == (4, 3)
    assert costs[np.arange(4), placement].sum() == pytest.approx(expected)
    more = transfer_costs(moves, previous, links, tokens_from=np.ones((3, 4)))
    np.testing.assert_allclose(more - costs, np.tile(links.sum(0), (4, 1)))


@pytest.mark.parametrize("exponent", [0.3, 0.6])
@pytest.mark.parametrize(("num_experts", "num_ranks"), [(64, 8), (256, 16)])
def test_many_experts_come_within_two_percent_of_the_bound(num_experts: int, num_ranks: int, exponent: float) -> None:
    """Zipf loads. No rank can have less than the mean, nor than the heaviest expert beside the lightest ones."""
    generator = np.random.default_rng(0)
    loads = generator.permutation(1000 / np.arange(1, num_experts + 1) ** exponent)
    lightest = np.sort(loads)[: num_experts // num_ranks - 1].sum()
    bound = max(loads.sum() / num_ranks, loads.max() + lightest)
    assert placement_cost(place_by_swaps(loads, num_ranks), loads) <= 1.02 * bound


def test_experts_move_to_their_tokens_when_links_are_slow() -> None:
    moves = np.diag([9, 9, 9, 9])  # expert i is always followed by expert i
    slow = 100 * (1 - np.eye(2))
    transfers = transfer_costs(moves, (1, 0, 0, 1), slow)
    assert place_experts([9, 9, 9, 9], 2, transfers=transfers) == (1, 0, 0, 1)


def test_small_problems_are_solved_exactly_where_swaps_are_not_enough() -> None:
    generator = np.random.default_rng(1)
    better = 0
    for _ in range(10):
        loads = generator.integers(1, 100, 9)
        swaps, chosen = place_by_swaps(loads, 3), place_experts(loads, 3)
        assert placement_cost(chosen, loads) <= placement_cost(swaps, loads)
        better += placement_cost(chosen, loads) < placement_cost(swaps, loads)
    assert better


@pytest.mark.parametrize(
    ("loads", "num_ranks", "transfers", "message"),
    [
        ([1, 2], 3, None, "2 experts cannot be placed on 3 ranks"),
        ([1, 2], 0, None, "2 experts cannot be placed on 0 ranks"),
        ([1, float("nan")], 2, None, "loads must be finite"),
        ([1, -1], 2, None, "loads must be finite and not negative"),
        ([1, 2], 2, np.zeros((2, 3)), r"transfers are \(2, 3\)"),
    ],
)
def test_nonsense_is_refused(loads, num_ranks, transfers, message) -> None:
    with pytest.raises(ValueError, match=message):
        place_experts(loads, num_ranks, transfers=transfers)
