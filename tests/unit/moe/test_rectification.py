"""Rectify-Router against its two rules written plainly, token by token, and what must hold for any routing."""

import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from skippipe_plugin.moe import (
    MoEConfig,
    MoELayer,
    NullExperts,
    Routing,
    Sigmoid,
    Softmax,
    attach,
    count_loads,
    rectify,
)
from skippipe_plugin.moe.routing import expert_capacity, limit_capacity
from tests.unit.moe.families import build, tokens
from tests.unit.moe.test_parallel import meet
from tests.unit.moe.together import Rank, gradients, run_together, spread

EXPERTS = 6


def as_matrix(routing: Routing) -> Tensor:
    """The weights [tokens, experts] that a routing amounts to, independent of the order of its slots."""
    matrix = torch.zeros(len(routing.experts), EXPERTS + 1, dtype=routing.weights.dtype)
    return matrix.scatter_add(1, routing.experts, routing.weights)[:, :EXPERTS]


def by_the_paper(scores: Tensor, top_k: int, capacity: int, what: str, here: set[int], bias: list[float]) -> Tensor:
    """Rectify a top-k router whose weights are the scores, one token and one expert at a time."""
    num_tokens, loads, table = len(scores), [0] * EXPERTS, scores.tolist()
    weights, visits = torch.zeros_like(scores), [set[int]() for _ in range(num_tokens)]
    chosen, dropped = [], [0] * num_tokens
    for token in range(num_tokens):
        ranking = sorted(range(EXPERTS), key=lambda expert: -(table[token][expert] + bias[expert]))
        chosen.append(ranking[:top_k])
        for expert in chosen[token]:
            if loads[expert] < capacity:
                loads[expert] += 1
                visits[token].add(expert)
            else:
                dropped[token] += 1
    if what in ("dropped", "both"):  # the best expert on the device, as often as an expert was lost
        for token in range(num_tokens):
            for _ in range(dropped[token]):
                near = [expert for expert in here if expert not in visits[token]]
                if near:
                    visits[token].add(max(near, key=lambda expert: table[token][expert] + bias[expert]))
    if what in ("padding", "both"):  # experts with room take the best of the tokens that would choose them next
        offers: dict[int, list[int]] = {expert: [] for expert in range(EXPERTS)}
        for token in range(num_tokens):
            rest = [expert for expert in range(EXPERTS) if expert not in visits[token] | set(chosen[token])]
            if rest:
                offers[max(rest, key=lambda expert: table[token][expert] + bias[expert])].append(token)
        for expert, willing in offers.items():
            for token in sorted(willing, key=lambda token: -table[token][expert])[: capacity - loads[expert]]:
                visits[token].add(expert)
    for token in range(num_tokens):
        for expert in visits[token]:
            weights[token, expert] = scores[token, expert]
    return weights


def setting(seed: int, num_tokens: int, skew: float) -> tuple[Tensor, Tensor]:
    """Scores that favour the first experts, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator) + skew * torch.linspace(1, 0, EXPERTS)
    return logits, 0.1 * torch.randn(EXPERTS, generator=generator)


CASES = {
    "seed": st.integers(0, 10_000),
    "num_tokens": st.integers(0, 30),
    "top_k": st.integers(1, EXPERTS),
    "capacity": st.integers(0, 12),
    "here": st.sets(st.integers(0, EXPERTS - 1)),
    "what": st.sampled_from(["dropped", "padding", "both"]),
}


@given(**CASES)
def test_it_is_the_papers_rule(
    seed: int, num_tokens: int, top_k: int, capacity: int, here: set[int], what: str
) -> None:
    logits, bias = setting(seed, num_tokens, 1.0)
    scores = logits.softmax(-1)
    routing = Softmax(renormalise=False)(logits, top_k, bias)
    limited = limit_capacity(routing, EXPERTS, capacity)
    mask = torch.tensor([expert in here for expert in range(EXPERTS)])
    ours = rectify(routing, limited, scores, capacity, what, bias=bias, here=mask)
    torch.testing.assert_close(as_matrix(ours), by_the_paper(scores, top_k, capacity, what, here, bias.tolist()))


@given(**CASES)
def test_capacity_is_kept_for_what_travels_and_no_token_comes_twice(
    seed: int, num_tokens: int, top_k: int, capacity: int, here: set[int], what: str
) -> None:
    logits, _ = setting(seed, num_tokens, 2.0)
    routing = Sigmoid()(logits, top_k, None)
    limited = limit_capacity(routing, EXPERTS, capacity)
    mask = torch.tensor([expert in here for expert in range(EXPERTS)])
    weights, experts = rectify(routing, limited, logits.sigmoid(), capacity, what, here=mask)
    for row in experts.tolist():
        visited = [expert for expert in row if expert < EXPERTS]
        assert len(visited) == len(set(visited))
    loads = count_loads(experts, EXPERTS)
    bounded = ~mask if what != "padding" else torch.ones_like(mask)
    assert not bounded.any() or loads[bounded].max() <= capacity
    assert bool((loads >= count_loads(limited.experts, EXPERTS)).all())
    assert bool((weights[experts == EXPERTS] == 0).all())
    kept = limited.experts < EXPERTS
    assert torch.equal(experts[:, :top_k][kept], limited.experts[kept])
    assert torch.equal(weights[:, :top_k][kept], limited.weights[kept])
    if what == "dropped":
        assert count_loads(experts, EXPERTS).sum() <= num_tokens * top_k


def test_weights_are_scores_on_the_scale_of_the_tokens_choices() -> None:
    """A normalising router with a factor: 0.5 and 0.3 become 2.5 and 1.5, so the next choice, 0.2, becomes 1."""
    scores = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    routing = Routing(4 * scores[:, :2] / scores[:, :2].sum(), torch.tensor([[0, 1]]))
    limited = limit_capacity(routing, 3, 0)
    weights, experts = rectify(routing, limited, scores, 1, "padding")
    assert experts.tolist() == [[3, 3, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 1.0]]))
    (gradient,) = torch.autograd.grad(weights.sum(), scores)
    torch.testing.assert_close(gradient, torch.tensor([[-1.25, -1.25, 5.0]]))  # of 4 c / (a + b)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral", {}), ("deepseek_v3", {"n_group": 1, "topk_group": 1}), ("qwen2_moe", {"norm_topk_prob": False})],
)
def test_a_device_with_all_experts_drops_nothing(family: str, changes: dict[str, object]) -> None:
    model = build(family, **changes)
    ids = tokens()
    expected = model(input_ids=ids, labels=ids).loss
    attached = attach(model, MoEConfig(capacity_factor=0.25, rectify="dropped"))
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, atol=1e-6, rtol=1e-6)
    assert all(hook.take().num_empty == 0 for hook in attached.hooks.values())


def test_the_statistics_count_what_stays_dropped_and_not_the_room_for_more() -> None:
    model, ids, seen = build("mixtral"), tokens(), []
    attached = attach(model, MoEConfig(capacity_factor=0.75, rectify="padding", causal=False))
    for router in attached.routers.values():
        router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    model(input_ids=ids, labels=ids)
    for hook, experts in zip(attached.hooks.values(), seen, strict=True):
        visited = [sum(expert < 4 for expert in row) for row in experts.tolist()]
        taken = hook.take()
        assert (int(taken.loads.sum()), taken.num_tokens) == (sum(visited), 24)
        assert taken.num_empty == sum(max(0, 2 - count) for count in visited) > 0
        assert max(visited) == 3
        assert int(taken.loads.max()) <= expert_capacity(24, 2, 4, 0.75)


def reference(rank: Rank, layer: MoELayer, hidden: Tensor, factor: float) -> Tensor:
    """Compute a rank's output with the whole layer, routed by the rules above."""
    (router,) = layer.own_routers()
    scores = router.gate(hidden).softmax(-1)
    (placement,) = rank.placements.values()
    here = {expert for expert, place in enumerate(placement) if place == rank.position}
    capacity = math.ceil(factor * len(hidden) * router.top_k / EXPERTS)
    matrix = by_the_paper(scores, router.top_k, capacity, "both", here, [0.0] * EXPERTS)
    every = torch.arange(EXPERTS).expand(len(hidden), -1)
    return layer.experts(hidden, every, matrix)


def test_on_spread_experts_the_device_is_the_rank() -> None:
    """Outputs and gradients are those of the whole layer; with the experts placed in no order."""
    torch.manual_seed(3)
    factor, placement = 0.5, {"experts": (0, 1, 1, 0, 1, 0)}
    layer = MoELayer(8, 12, EXPERTS, router=Softmax(renormalise=False))
    config = MoEConfig(capacity_factor=factor, rectify="both", causal=False)
    ranks = spread(layer, 2, placement, config)
    parts = [torch.randn(20, 8), torch.randn(13, 8)]
    expected = [reference(rank, layer, part, factor) for rank, part in zip(ranks, parts, strict=True)]
    sum((each**2).sum() for each in expected).backward()

    def work(rank: Rank) -> Tensor:
        output = meet(rank, lambda: rank.model(parts[rank.position]))
        meet(rank, (output**2).sum().backward)
        return output.detach()

    for found, wanted in zip(run_together(ranks, work), expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-5)
    whole = {name: each.grad for name, each in layer.named_parameters()}
    torch.testing.assert_close(gradients(ranks), whole, atol=1e-5, rtol=1e-5)


def test_activations_are_recomputed() -> None:
    model = build("qwen3_moe")
    config = MoEConfig(capacity_factor=0.5, rectify="both", causal=False)
    attached = attach(model, config)
    ids, found = tokens(), []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})
        assert all(hook.take().num_tokens == 24 for hook in attached.hooks.values())
    torch.testing.assert_close(*found)


def test_null_experts_stay_empty() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 12, 3, top_k=2, router=NullExperts(num_null=3))
    hidden = torch.randn(40, 8)
    attached = attach(nn.Sequential(layer), MoEConfig(capacity_factor=0.5, rectify="both", causal=False))
    nn.Sequential(layer)(hidden)
    _, _, experts = layer.own_routers()[0](hidden)
    chosen = layer.own_routers()[0].gate(hidden).softmax(-1).topk(2).indices
    nothing = (chosen >= 3).all(-1)
    assert nothing.any()
    assert bool((experts[nothing] == 3).all())
    assert next(iter(attached.hooks.values())).take().num_tokens == 80


@pytest.mark.parametrize(("what", "leaks"), [("dropped", False), ("padding", True), ("both", True)])
def test_it_warns_of_a_leak_where_there_is_one(what: str, leaks: bool) -> None:
    def routed(logits: Tensor) -> Tensor:
        routing = Softmax()(logits, 2)
        limited = limit_capacity(routing, EXPERTS, 5)
        return as_matrix(rectify(routing, limited, logits.softmax(-1), 5, what, here=torch.arange(EXPERTS) < 2))[:-1]

    def depends_on_the_future(seed: int) -> bool:
        logits, _ = setting(seed, 20, 1.0)
        changed = logits.clone()
        changed[-1] = setting(seed + 1000, 1, 0.0)[0]
        return not torch.equal(routed(logits), routed(changed))

    assert any(depends_on_the_future(seed) for seed in range(30)) is leaks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(build("mixtral"), MoEConfig(capacity_factor=1.0, rectify=what))
    assert any("leaks the future" in str(each.message) for each in caught) is leaks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rectify": "both"}, "rectify='both' has no effect without a capacity_factor"),
        (
            {"rectify": "all", "capacity_factor": 1.0},
            "rectify='all' is unknown; it is one of 'dropped', 'padding', 'both', or None",
        ),
        (
            {"rectify": "dropped", "capacity_factor": 1.0, "router": "gshard"},
            "the router 'gshard' has a limit of its own",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def test_groups_that_are_closed_stay_closed() -> None:
    model = build("deepseek_v3")
    with pytest.raises(ValueError, match=r"router model.layers.1.mlp.gate has closed to them; use rectify='dropped'"):
        attach(model, MoEConfig(capacity_factor=1.0, rectify="padding", causal=False))


def test_an_unknown_kind_of_waste_is_named() -> None:
    routing = Softmax()(torch.zeros(2, EXPERTS), 1)
    with pytest.raises(ValueError, match="rectify='heat' is unknown; choose one of 'dropped'"):
        rectify(routing, routing, torch.zeros(2, EXPERTS), 1, "heat")
