"""Placements against brute force."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from skippipe_plugin.moe.migration import ExpertCosts, plan_move
from skippipe_plugin.moe.placement import (
    place_by_swaps,
    place_exactly,
    place_experts,
    placement_cost,
    transfer_costs,
)
from skippipe_plugin.moe.shards import moved_rows, moves, rows_of


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


def costs(row_s: float = 1e-6, bandwidth: float = 1e9, size: int = 2, row_bytes: int = 0) -> ExpertCosts:
    links = np.full((size, size), 1 / bandwidth)
    return ExpertCosts(row_s, row_bytes, 1_000_000, links)


def test_a_move_swaps_as_few_experts_as_it_needs() -> None:
    move = plan_move([10, 10, 0, 0], (0, 0, 1, 1), costs(), steps=100)
    assert move is not None
    assert sorted(move.placement) == [0, 0, 1, 1]
    assert move.num_moved == 2
    assert move.saved_s == pytest.approx(3 * 10e-6)  # forward and backward of the ten rows that leave the busier rank
    assert move.cost_s == pytest.approx(2 * 1e6 / 1e9)


def test_a_move_must_pay_for_itself() -> None:
    """It saves 30 microseconds per step and costs 2 milliseconds."""
    loads, present = [10, 10, 0, 0], (0, 0, 1, 1)
    assert plan_move(loads, present, costs(), steps=66) is None
    assert plan_move(loads, present, costs(), steps=67) is not None
    assert plan_move(loads, present, costs(bandwidth=1e8), steps=100) is None


def test_balanced_experts_stay() -> None:
    assert plan_move([5, 5, 5, 5], (0, 0, 1, 1), costs(), steps=10**9) is None


def test_slow_links_draw_heavy_experts_to_where_tokens_get_fast() -> None:
    """Rank 2 is far from the others: with rows that are expensive to send, the light experts belong there."""
    links = np.array([[0, 1, 100], [1, 0, 100], [100, 100, 0]]) / 1e9
    far = ExpertCosts(1e-9, 4096, 1, links)
    move = plan_move([1, 1, 1, 1, 9, 9], (0, 0, 1, 1, 2, 2), far, steps=1000)
    assert move is not None
    assert move.placement[4] != 2
    assert move.placement[5] != 2


@given(st.lists(st.integers(0, 100), min_size=4, max_size=12), st.integers(2, 4), st.integers(0, 99))
def test_moves_improve_and_keep_the_counts(loads: list[int], size: int, seed: int) -> None:
    loads = loads[: len(loads) // size * size] or [1] * size
    present = np.random.default_rng(seed).permutation(np.arange(len(loads)) % size).tolist()
    move = plan_move(loads, tuple(present), costs(size=size), steps=10**9)
    if move is not None:
        assert sorted(move.placement) == sorted(present)
        assert placement_cost(move.placement, loads) < placement_cost(present, loads)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 999))
def test_moved_rows_end_where_the_new_placement_says(size: int, per_rank: int, seed: int) -> None:
    """Every shard's rows are numbered by expert; what arrives must be the numbers of the new placement."""
    generator = np.random.default_rng(seed)
    before, after = (tuple(generator.permutation(np.arange(size * per_rank) % size).tolist()) for _ in range(2))
    shards = [torch.tensor(rows_of(before, position)) for position in range(size)]
    plans = [moves(before, after, position) for position in range(size)]
    for position in range(size):
        _, arrive = moved_rows(*plans[position], before, after, position)
        came = []
        for other in range(size):
            leave, _ = moved_rows(*plans[other], before, after, other)
            first = sum(len(each) for each in plans[other][0][:position])
            came.append(shards[other][leave][first : first + len(plans[other][0][position])])
        new = torch.empty(per_rank, dtype=torch.int64)
        new[arrive] = torch.cat(came)
        assert new.tolist() == rows_of(after, position)
