"""Routers against the models' own router modules, and against their papers' equations written plainly."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from skippipe_plugin.moe.gates import CosineGate, LinearGate
from skippipe_plugin.moe.routers import (
    ROUTERS,
    ExpertChoice,
    GShard,
    NullExperts,
    Sigmoid,
    Softmax,
    find_router,
)
from skippipe_plugin.moe.routing import Router, Routing, count_loads, is_causal, limit_capacity, route
from tests.unit.moe.families import build

HIDDEN = 16


def as_matrix(routing: Routing, num_experts: int) -> Tensor:
    """The weights [tokens, experts] that a routing amounts to, independent of the order of its slots."""
    matrix = torch.zeros(len(routing.experts), num_experts + 1, dtype=routing.weights.dtype)
    return matrix.scatter_add(1, routing.experts, routing.weights)[:, :num_experts]


def random_logits(seed: int, tokens: int = 64, num_experts: int = 8) -> Tensor:
    return torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def their_router(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if type(module).__name__.endswith(("TopKRouter", "TopkRouter")))


@pytest.mark.parametrize(
    ("family", "changes", "router"),
    [
        ("mixtral", {}, Softmax()),
        ("qwen2_moe", {"norm_topk_prob": False}, Softmax(renormalise=False)),
        ("qwen3_moe", {"norm_topk_prob": True}, Softmax()),
        ("olmoe", {"norm_topk_prob": False}, Softmax(renormalise=False)),
        ("gpt_oss", {}, Softmax()),
        ("granitemoe", {}, Softmax()),
        ("deepseek_v3", {"routed_scaling_factor": 2.5}, Sigmoid(scale=2.5, num_groups=2, top_groups=1)),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}, Sigmoid(scale=2.5, num_groups=4, top_groups=2)),
        ("deepseek_v3", {"norm_topk_prob": False}, Sigmoid(scale=2.5, num_groups=2, renormalise=False)),
    ],
)
def test_named_routers_choose_and_weigh_as_the_families_do(family, changes, router) -> None:
    theirs = their_router(build(family, **changes))
    hidden = torch.randn(50, HIDDEN, requires_grad=True)
    logits, weights, index = theirs(hidden)
    ours = route(router, logits, theirs.top_k, getattr(theirs, "e_score_correction_bias", None))
    expected = as_matrix(Routing(weights, index), theirs.num_experts)
    actual = as_matrix(ours, theirs.num_experts)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad((actual**2).sum(), hidden, retain_graph=True),
        torch.autograd.grad((expected**2).sum(), hidden),
        atol=1e-6,
        rtol=1e-5,
    )


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 8), strength=st.floats(0, 2))
def test_a_bias_moves_the_choice_and_not_the_weights(seed: int, top_k: int, strength: float) -> None:
    logits = random_logits(seed)
    bias = strength * torch.randn(8, generator=torch.Generator().manual_seed(seed + 1))
    for router, scores in (
        (Softmax(renormalise=False), logits.softmax(-1)),
        (Sigmoid(renormalise=False), logits.sigmoid()),
    ):
        weights, index = router(logits, top_k, bias)
        best = (scores + bias).sort(dim=-1, descending=True).indices[:, :top_k]
        assert torch.equal(index.sort(-1).values, best.sort(-1).values)
        torch.testing.assert_close(weights, scores.gather(1, index))


def gshard_by_the_paper(logits: Tensor, capacity: int) -> Tensor:
    """Algorithm 1 of GShard for one group, with top-2 and without random dispatch, token by token."""
    gates = logits.softmax(-1)
    num_tokens, num_experts = gates.shape
    combine, counts = torch.zeros_like(gates), [0] * num_experts
    best = gates.sort(dim=-1, descending=True)
    for choice in (0, 1):
        for token in range(num_tokens):
            expert = int(best.indices[token, choice])
            if counts[expert] < capacity:
                combine[token, expert] = best.values[token, choice] / best.values[token, :2].sum()
            counts[expert] += 1
    return combine


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_gshard_is_the_papers_algorithm(seed: int, factor: float) -> None:
    logits = random_logits(seed)
    ours = route(GShard(capacity_factor=factor), logits, 2)
    expected = gshard_by_the_paper(logits, math.ceil(factor * 64 * 2 / 8))
    torch.testing.assert_close(as_matrix(ours, 8), expected)


def test_random_dispatch_keeps_second_choices_with_twice_their_weight() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -9.0]]).repeat(20_000, 1)
    second = 1 / (1 + math.e)
    _, index = route(GShard(capacity_factor=3.0, random_dispatch=True), logits, 2)
    assert bool((index[:, 0] == 0).all())
    assert (index[:, 1] == 1).float().mean().item() == pytest.approx(2 * second, abs=0.02)


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 4), factor=st.floats(0.1, 3))
def test_every_expert_takes_its_best_tokens_by_expert_choice(seed: int, top_k: int, factor: float) -> None:
    logits = random_logits(seed, tokens=20, num_experts=4)
    capacity = min(20, math.ceil(factor * 20 * top_k / 4))
    scores = logits.softmax(-1)
    expected = torch.zeros_like(scores)
    for expert in range(4):
        for token in sorted(range(20), key=lambda token: -scores[token, expert])[:capacity]:
            expected[token, expert] = scores[token, expert]
    ours = route(ExpertChoice(capacity_factor=factor), logits, top_k)
    torch.testing.assert_close(as_matrix(ours, 4), expected)
    assert count_loads(ours.experts, 4).tolist() == [capacity] * 4


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 6), num_null=st.integers(1, 5))
def test_null_experts_take_slots_and_give_nothing(seed: int, top_k: int, num_null: int) -> None:
    logits = random_logits(seed, tokens=30, num_experts=3 + num_null)[:, : 3 + num_null]
    top_k = min(top_k, 3 + num_null)
    expected = torch.zeros(30, 3)
    for token in range(30):
        chosen = sorted(range(3 + num_null), key=lambda e: -logits[token, e])[:top_k]
        true = [expert for expert in chosen if expert < 3]
        total = sum(math.exp(logits[token, expert]) for expert in true)
        for expert in true:
            expected[token, expert] = math.exp(logits[token, expert]) / total
    ours = route(NullExperts(num_null=num_null), logits, top_k)
    torch.testing.assert_close(as_matrix(ours, 3), expected)
    assert ours.experts.max() <= 3


def test_the_cosine_gate_is_equation_5_of_x_moe() -> None:
    torch.manual_seed(0)
    gate = CosineGate(HIDDEN, 6, rank=4, temperature=0.3).double()
    hidden = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    logits = gate(hidden)
    for token in range(5):
        for expert in range(6):
            low, embedding = gate.projection @ hidden[token], gate.weight[expert]
            cosine = low @ embedding / (low.norm() * embedding.norm())
            torch.testing.assert_close(logits[token, expert], cosine / 0.3)
    assert torch.autograd.gradcheck(gate, (hidden,))


def test_the_cosine_gate_ignores_lengths_and_its_temperature_has_a_floor() -> None:
    gate = CosineGate(HIDDEN, 4)
    hidden = torch.randn(7, HIDDEN)
    torch.testing.assert_close(gate(hidden), gate(100 * hidden))
    with torch.no_grad():
        gate.log_temperature.fill_(-100.0)
    assert gate(hidden).abs().max() <= 100.0001


def test_a_linear_gate_starts_like_a_linear_layer() -> None:
    torch.manual_seed(0)
    gate = LinearGate(HIDDEN, 4)
    torch.manual_seed(0)
    assert torch.equal(gate.weight, nn.Linear(HIDDEN, 4, bias=False).weight)


@given(
    seed=st.integers(0, 10_000),
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(2, 9),
    top_k=st.integers(1, 9),
    name=st.sampled_from(sorted(ROUTERS)),
)
def test_what_holds_for_every_router(seed: int, num_tokens: int, num_experts: int, top_k: int, name: str) -> None:
    top_k = min(top_k, num_experts)
    logits = random_logits(seed, num_tokens, num_experts)
    weights, index = route(find_router(name), logits, top_k)
    true_experts = num_experts - (name == "null_experts")
    filled = index < true_experts
    assert bool((weights[~filled] == 0).all())
    assert bool((weights >= 0).all())
    for row in index.tolist():  # no token twice at an expert
        chosen = [expert for expert in row if expert < true_experts]
        assert len(chosen) == len(set(chosen))
    total = weights.sum(-1)
    if name in ("softmax", "sigmoid"):
        torch.testing.assert_close(total, torch.ones(num_tokens))
    if name == "null_experts":
        torch.testing.assert_close(total, filled.any(-1).float())
    if name == "gshard":
        capacity = math.ceil(1.25 * num_tokens * top_k / num_experts)
        assert count_loads(index, num_experts).max() <= capacity


@given(
    seed=st.integers(0, 1000),
    capacity=st.integers(0, 12),
    priority=st.sampled_from(["position", "choice", "weight"]),
)
def test_capacity_is_kept_and_only_full_experts_drop_tokens(seed: int, capacity: int, priority: str) -> None:
    routing = Softmax()(random_logits(seed, tokens=20, num_experts=5), 3)
    limited = limit_capacity(routing, 5, capacity, priority)
    before, after = count_loads(routing.experts, 5), count_loads(limited.experts, 5)
    assert after.tolist() == before.clamp(max=capacity).tolist()
    kept = limited.experts < 5
    assert torch.equal(limited.experts[kept], routing.experts[kept])
    assert torch.equal(limited.weights[kept], routing.weights[kept])
    if priority == "weight":  # whoever stays has at least the weight of whoever goes
        for expert in range(5):
            at = routing.experts == expert
            stays, goes = routing.weights[at & kept], routing.weights[at & ~kept]
            assert not len(goes) or not len(stays) or stays.min() >= goes.max()


def depends_on_the_future(router: Router) -> bool:
    """Change the last of 32 tokens and look whether an earlier one is routed otherwise."""
    for seed in range(30):
        logits = random_logits(seed, 32)
        changed = logits.clone()
        changed[-1] = random_logits(seed + 1000, 1)
        matrices = [as_matrix(Routing(*router(each, 2, None)), 8)[:-1] for each in (logits, changed)]
        if not torch.equal(*matrices):
            return True
    return False


@pytest.mark.parametrize(
    "router",
    [Softmax(), Sigmoid(), NullExperts(), ExpertChoice(), GShard(capacity_factor=0.5)]
    + [GShard(capacity_factor=0.5, priority=priority) for priority in ("position", "weight")],
    ids=repr,
)
def test_routers_know_whether_they_look_at_later_tokens(router: Router) -> None:
    assert is_causal(router) is not depends_on_the_future(router)


def test_any_callable_is_a_router() -> None:
    def first(logits: Tensor, top_k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        index = torch.zeros(len(logits), 1, dtype=torch.int64)
        return torch.ones(len(logits), 1), index

    assert find_router(first) is first
    assert route(first, random_logits(0), 2).experts.eq(0).all()


def ones(rows: int, slots: int) -> Tensor:
    return torch.ones(rows, slots)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((ones(3, 2), ones(4, 2).long()), r"weights \(3, 2\) and index \(4, 2\); both must be \[4 tokens, slots\]"),
        ((ones(4, 2), ones(4, 2)), "an index of torch.float32"),
        ((ones(4, 2), 9 * ones(4, 2).long()), "chose experts 9 to 9; there are 0 to 7"),
        ((ones(4, 2), -ones(4, 2).long()), "chose experts -1 to -1"),
    ],
)
def test_wrong_answers_are_named(answer, message) -> None:
    def mine(*_):
        return answer

    with pytest.raises(ValueError, match=f"router mine of layers.3.mlp.*{message}"):
        route(mine, random_logits(0, tokens=4), 2, where="layers.3.mlp")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: find_router("sofmax"), "router='sofmax' is unknown; choose one of softmax, sigmoid"),
        (lambda: route(Softmax(), random_logits(0), 9), "top_k=9 is out of range.* at most 8"),
        (lambda: route(Softmax(), random_logits(0), 0), "top_k=0 is out of range"),
        (lambda: route(Softmax(), torch.zeros(2, 3, 4), 1), r"have the shape \(2, 3, 4\)"),
        (lambda: route(Softmax(), torch.tensor([[0.0, math.nan], [0.0, 0.0]]), 1), "NaN for 1 of 2 tokens"),
        (lambda: route(Sigmoid(num_groups=3), random_logits(0), 2), "8 experts in num_groups=3"),
        (lambda: route(Sigmoid(num_groups=4), random_logits(0), 3), "do not serve top_k=3"),
        (lambda: Sigmoid(num_groups=2, top_groups=3), "top_groups=3 is out of range"),
        (lambda: GShard(capacity_factor=0.0), "capacity_factor=0.0 is out of range"),
        (lambda: ExpertChoice(capacity_factor=-1.0), "capacity_factor=-1.0 is out of range"),
        (lambda: GShard(priority="first")(random_logits(0), 2), "priority='first' is unknown"),
        (lambda: NullExperts(num_null=0), "num_null=0 is out of range"),
        (lambda: NullExperts(num_null=8)(random_logits(0), 2), "leaves no true expert among 8"),
    ],
)
def test_nonsense_is_refused(action, message) -> None:
    with pytest.raises(ValueError, match=message):
        action()


def test_deepseeks_closed_groups_stay_closed() -> None:
    """A case where the group limit decides: the best single expert sits in the worse group."""
    logits = torch.tensor([[4.0, -4.0, 2.0, 2.0]])
    theirs = build("deepseek_v3", n_routed_experts=4).model.layers[1].mlp.gate
    assert isinstance(theirs, DeepseekV3TopkRouter)
    _, index = Sigmoid(num_groups=2)(logits, 2)
    assert sorted(index[0].tolist()) == [2, 3]
    _, index = Sigmoid()(logits, 2)
    assert 0 in index[0].tolist()
