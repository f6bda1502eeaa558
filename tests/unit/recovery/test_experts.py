"""Experts find their partners, whatever order they stand in."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skippipe_plugin.moe import MoELayer
from skippipe_plugin.moe.routers import NullExperts
from skippipe_plugin.moe.routing import Router
from skippipe_plugin.recovery import rebuild_block
from skippipe_plugin.recovery.experts import align_experts, find_mixtures, match_experts
from tests.unit.moe.families import FAMILIES, build

EXPERTS = 4


def layer(router: str | Router = "softmax", seed: int = 0, **options) -> MoELayer:
    torch.manual_seed(seed)
    made = MoELayer(16, 8, EXPERTS, router=router, **options)
    for each in made.own_routers():
        nn.init.normal_(each.selection_bias)
    return made


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def shuffled(state: dict[str, Tensor], order: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Reorder by hand, with the names of what has a row per expert written out."""
    rows = [*order, *range(len(order), 99)]
    return {
        name: tensor[[row for row in rows if row < len(tensor)]] if name.startswith(names) else tensor.clone()
        for name, tensor in state.items()
    }


@given(st.permutations(range(EXPERTS)), st.sampled_from(["softmax", "sigmoid", "cosine"]), st.integers(1, 2))
def test_shuffled_copies_of_a_layer_average_to_exactly_that_layer(order, router: str, iterations: int) -> None:
    module = layer(router, iterations=iterations)
    state = state_of(module)
    names = ("experts.", *(f"routers.{k}.{rest}" for k in range(2) for rest in ("gate.weight", "selection_bias")))
    other = shuffled(state, tuple(order), names)
    merged = rebuild_block([state, other], [3.0, 1.0])
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
    # The shuffled layer was the same function, so the names above are all that belong together.
    hidden = torch.randn(5, 16)
    before = module(hidden)
    module.load_state_dict(other)
    torch.testing.assert_close(module(hidden), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_every_family_are_recognised(family: str) -> None:
    model = build(family)
    block = state_of(model.model.layers[1])
    (mixture,) = find_mixtures(block)
    order = list(reversed(range(mixture.num_experts)))
    model.model.layers[1].load_state_dict(block | mixture.reordered(block, order))
    if family != "deepseek_v3":  # whose router chooses among fixed groups of experts
        ids = torch.randint(1, 32, (2, 6))
        torch.testing.assert_close(model(ids).logits, build(family)(ids).logits)
    merged = rebuild_block([block, state_of(model.model.layers[1])], [1.0, 1.0])
    assert all(torch.equal(merged[name], tensor) for name, tensor in block.items())


def test_experts_that_are_modules_move_whole() -> None:
    def block(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.Module()
        made.router = nn.Sequential(nn.Linear(6, EXPERTS), nn.ReLU(), nn.Linear(EXPERTS, EXPERTS))
        made.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(EXPERTS))
        made.norm = nn.LayerNorm(EXPERTS)
        return made

    state, order = state_of(block(0)), (2, 0, 3, 1)
    other = shuffled(state, order, ("router.2.",))
    for place, expert in enumerate(order):
        other |= {f"experts.{place}.{name}": state[f"experts.{expert}.{name}"] for name in ("weight", "bias")}
    merged = rebuild_block([state, other], [1.0, 1.0])
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_partners_are_the_best_of_all_pairings(seed: int) -> None:
    first, second = state_of(layer(seed=seed)), state_of(layer(seed=seed + 1))
    (mixture,) = find_mixtures(first)
    parts = ("experts.gate_up_proj", "experts.down_proj", "routers.0.gate.weight")

    def likeness(order) -> float:
        cosine = nn.functional.cosine_similarity
        pairs = [(first[name].flatten(1), second[name][list(order)].flatten(1)) for name in parts]
        return sum(float(cosine(a.double(), b.double()).sum()) for a, b in pairs)

    best = max(likeness(order) for order in permutations(range(EXPERTS)))
    assert likeness(match_experts(mixture, first, second)) == pytest.approx(best)


def test_null_experts_keep_their_place() -> None:
    state = state_of(layer(NullExperts(num_null=2)))
    assert len(state["routers.0.gate.weight"]) == EXPERTS + 2
    other = shuffled(state, (1, 0, 3, 2), ("experts.", "routers.0.gate.weight", "routers.0.selection_bias"))
    assert torch.equal(other["routers.0.gate.weight"][EXPERTS:], state["routers.0.gate.weight"][EXPERTS:])
    aligned = align_experts(state, other)
    assert all(torch.equal(aligned[name], tensor) for name, tensor in state.items())


def test_what_is_no_mixture_is_left_alone() -> None:
    lone = {"experts.up": torch.ones(3, 2), "norm.weight": torch.ones(3)}  # no router
    uneven = {"experts.up": torch.ones(3, 2), "experts.down": torch.ones(2, 2), "gate.weight": torch.ones(3, 2)}
    dense = {"gate.weight": torch.ones(3, 2), "up.weight": torch.ones(3, 2)}
    for state in (lone, uneven, dense):
        assert not find_mixtures(state)
        assert align_experts(state, dict(reversed(list(state.items())))) == state
