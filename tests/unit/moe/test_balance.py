"""Rules of balance against their equations, against simulations, and against transformers' own loss."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.optimize import linprog
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from skippipe_plugin.moe import (
    BIAS_RULES,
    Sigmoid,
    add_auxiliary_loss,
    attach,
    count_loads,
    load_balancing_loss,
    max_violation,
    quantile_bias,
    update_by_sign,
    update_in_proportion,
)
from skippipe_plugin.moe.attach import RouterStatistics
from skippipe_plugin.moe.metrics import EmptyShare, ExpertShare, MaxViolation, RouterEntropy
from tests.unit.moe.families import build, tokens


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_max_violation(loads: list[int]) -> None:
    mean = sum(loads) / len(loads)
    expected = (max(loads) - mean) / mean if mean else 0.0
    assert max_violation(torch.tensor(loads)) == pytest.approx(expected)
    assert -1e-12 <= expected <= len(loads) - 1 + 1e-9


def test_biases_move_against_the_load() -> None:
    bias, loads = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([40, 20, 10, 10])
    torch.testing.assert_close(update_by_sign(bias, loads, 0.01), torch.tensor([0.09, 0.2, 0.31, 0.41]))
    torch.testing.assert_close(update_in_proportion(bias, loads, 0.1), torch.tensor([0.0, 0.2, 0.35, 0.45]))


@pytest.mark.parametrize("rule", BIAS_RULES.values())
def test_no_load_moves_nothing(rule) -> None:
    assert torch.equal(rule(torch.ones(3), torch.zeros(3, dtype=torch.int64), 0.1), torch.ones(3))
    with pytest.raises(ValueError, match=r"a bias \(3,\) and loads \(4,\) are not of the same experts"):
        rule(torch.ones(3), torch.ones(4), 0.1)


def steps_to_balance(update, num_experts: int = 16, top_k: int = 2, limit: int = 300) -> int:
    """Simulate sigmoid scores with a fixed skew; return the steps until MaxVio is below 0.1."""
    generator = torch.Generator().manual_seed(0)
    skew = 0.7 * torch.randn(num_experts, generator=generator)
    bias, router = torch.zeros(num_experts), Sigmoid()
    for step in range(limit):
        logits = skew + torch.randn(8192, num_experts, generator=generator)
        loads = count_loads(router(logits, top_k, bias).experts, num_experts)
        if step == 0:
            assert max_violation(loads) > 1
        if max_violation(loads) < 0.1:
            return step
        bias = update(bias, loads, logits)
    return limit


def test_skewed_routers_become_balanced_in_the_papers_steps() -> None:
    """The sign rule with the paper's rate takes a few hundred steps, the others a few dozen and a few."""
    sign = steps_to_balance(lambda bias, loads, _: update_by_sign(bias, loads))
    proportional = steps_to_balance(lambda bias, loads, _: update_in_proportion(bias, loads))
    quantile = steps_to_balance(lambda bias, _, logits: quantile_bias(logits.sigmoid(), 2, bias))
    assert quantile <= 12
    assert proportional <= 60
    assert 100 <= sign <= 300


def best_balanced_total(scores: Tensor, top_k: int) -> float:
    """The largest sum of scores with ``top_k`` experts per token and equal loads, by linear programming."""
    num_tokens, num_experts = scores.shape
    size = num_tokens * num_experts
    cells = np.arange(size).reshape(num_tokens, num_experts)
    rows, columns = np.zeros((num_tokens, size)), np.zeros((num_experts, size))
    for token in range(num_tokens):
        rows[token, cells[token]] = 1
    for expert in range(num_experts):
        columns[expert, cells[:, expert]] = 1
    share = num_tokens * top_k / num_experts
    result = linprog(-scores.reshape(-1).numpy(), columns, [share] * num_experts, rows, [top_k] * num_tokens, (0, 1))
    return -float(result.fun)


@pytest.mark.parametrize("seed", range(3))
def test_quantile_balancing_descends_to_the_assignment_problems_optimum(seed: int) -> None:
    """By duality ``sum of top_k(scores + bias) - share * sum(bias)`` is never below the best balanced total."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(64, 8, generator=generator, dtype=torch.float64) + torch.linspace(0, 0.5, 8)
    optimum, bias, share = best_balanced_total(scores, 2), torch.zeros(8, dtype=torch.float64), 16
    values = []
    for _ in range(20):
        values.append(float((scores + bias).topk(2, dim=-1).values.sum() - share * bias.sum()))
        bias = quantile_bias(scores, 2, bias)
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert values[0] > 1.03 * optimum
    assert optimum - 1e-9 <= values[-1] <= 1.002 * optimum
    assert max_violation(count_loads((scores + bias).topk(2, dim=-1).indices, 8)) < 0.2


def test_the_quantile_is_that_of_a_case_reckoned_by_hand() -> None:
    """Four tokens, two experts, one each: two tokens are an expert's share.

    Prices are each token's second best: 0.1, 0.2, 0.3, 0.6. Expert 0's margins over them are 0.8, 0.6, 0.4, 0.0, of
    which the third largest is 0.4; expert 1's are 0.0, 0.0, 0.0, 0.1, the third largest 0.0.
    """
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.7]], dtype=torch.float64)
    expected = torch.tensor([-0.4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(quantile_bias(scores, 1, torch.zeros(2, dtype=torch.float64)), expected)


@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(4, 40), st.data())
def test_an_experts_share_of_tokens_pays_the_price_and_no_token_more(
    seed: int, num_experts: int, num_tokens: int, data: st.DataObject
) -> None:
    """What makes the quantile the quantile: an expert beats the prices of its share of tokens, but for ties."""
    top_k = data.draw(st.integers(1, num_experts - 1))
    chance = np.random.default_rng(seed)
    scores, bias = chance.random((num_tokens, num_experts)), 0.1 * chance.random(num_experts)
    found = quantile_bias(torch.tensor(scores), top_k, torch.tensor(bias)).numpy()
    prices = [sorted(row, reverse=True)[top_k] for row in scores + bias]
    for expert in range(num_experts):
        margins = [scores[token, expert] + found[expert] - prices[token] for token in range(num_tokens)]
        above, reaching = sum(m > 1e-12 for m in margins), sum(m > -1e-12 for m in margins)
        assert above <= num_tokens * top_k // num_experts < reaching  # between them is the first that is left out


def test_quantile_balancing_has_limits() -> None:
    assert torch.equal(quantile_bias(torch.zeros(0, 4), 2, torch.ones(4)), torch.ones(4))
    with pytest.raises(ValueError, match="top_k=4 is out of range; quantile balancing needs 1 to 3"):
        quantile_bias(torch.rand(8, 4), 4, torch.zeros(4))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_is_that_of_transformers(top_k: int) -> None:
    """Theirs counts shares that sum to top_k."""
    logits = torch.randn(50, 6, requires_grad=True)
    loads = count_loads(logits.topk(top_k).indices, 6)
    ours = load_balancing_loss(logits.softmax(-1), loads) * top_k
    theirs = load_balancing_loss_func((logits,), 6, top_k)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_even_loads_cost_one_and_no_token_nothing() -> None:
    assert load_balancing_loss(torch.full((8, 4), 0.25), torch.full((4,), 2)).item() == pytest.approx(1)
    assert load_balancing_loss(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int64)).item() == 0


def test_global_statistics_make_microbatches_one_batch() -> None:
    logits = torch.randn(40, 6)
    loads = count_loads(logits.topk(2).indices, 6)
    whole = load_balancing_loss(logits.softmax(-1), loads)
    parts = [load_balancing_loss(part.softmax(-1), loads) for part in logits.chunk(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_an_added_loss_is_back_propagated() -> None:
    weights, other = torch.randn(3, 2, requires_grad=True), torch.randn(5, requires_grad=True)
    result = add_auxiliary_loss(weights * 1, (other**2).sum())
    assert torch.equal(result, weights)
    (result * 2).sum().backward()
    assert torch.equal(weights.grad, torch.full((3, 2), 2.0))
    torch.testing.assert_close(other.grad, 2 * other)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_add_the_loss_where_the_router_lives(checkpointing: bool) -> None:
    model = build("qwen3_moe", experts_implementation="eager")
    ids = tokens()
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    penalty = sum(
        load_balancing_loss(logits.softmax(-1), count_loads(logits.topk(2).indices, 8))
        for logits in output.router_logits
    )
    loss = model(input_ids=ids, labels=ids).loss
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss + 0.1 * 0.5 * penalty, parameters, allow_unused=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for hook in attach(model).hooks.values():
        hook.loss_coefficient, hook.loss_scale = 0.1, 0.5
    actual = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters, allow_unused=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def statistics(loads: list[int], num_tokens: int, num_empty: int, entropy: float) -> RouterStatistics:
    return RouterStatistics(torch.tensor(loads), num_tokens, num_empty, entropy)


def test_metrics_add_up_over_updates() -> None:
    parts = [statistics([4, 0, 0], 4, 4, 2.0), statistics([1, 2, 1], 2, 0, 1.0)]
    values = {}
    for metric in (ExpertShare(3), MaxViolation(3), EmptyShare(), RouterEntropy()):
        metric.update(statistics([0, 0, 0], 0, 0, 0.0))
        assert not metric.compute().any()  # nothing seen: no division by zero
        for part in parts:
            metric.update(part)
        values[type(metric)] = metric.compute()
    torch.testing.assert_close(values[ExpertShare], torch.tensor([5 / 8, 2 / 8, 1 / 8]))
    assert values[MaxViolation].item() == pytest.approx(5 / (8 / 3) - 1)
    assert values[EmptyShare].item() == pytest.approx(4 / 12)
    assert values[RouterEntropy].item() == pytest.approx(0.5)
    total = parts[0] + parts[1]
    assert (total.loads.tolist(), total.num_tokens, total.num_empty, total.entropy) == ([5, 2, 1], 6, 4, 3.0)
