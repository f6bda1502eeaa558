"""Leaving blocks out of state dicts and configurations, against models whose blocks are deleted."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from skippipe_plugin.omit import find_stack, resize_config, stage_blocks, without_blocks
from skippipe_plugin.partition import cut, estimate_costs, find_blocks

DEPTH = 5


class Block(nn.Module):
    """Residual, with a list of parts and a buffer inside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("scale", torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + torch.tanh(part(self.norm(x))) * self.scale
        return x


class Model(nn.Module):
    """An embedding, a stack, a head of a few numbered layers."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(depth))})
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 7))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.body["layers"]:
            x = block(x)
        return self.head(x)


def sequential() -> nn.Sequential:
    """A chain whose stack shares its numbers with other layers, one of them without a name in the state dict."""
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), *(Block() for _ in range(DEPTH)), nn.Linear(4, 2))


@pytest.mark.parametrize("gone", [c for r in range(1, DEPTH) for c in itertools.combinations(range(DEPTH), r)])
def test_the_rest_computes_what_the_model_without_these_blocks_computes(gone: tuple[int, ...]) -> None:
    whole, tokens = Model(), torch.arange(7)
    smaller = Model(DEPTH - len(gone))
    state = whole.state_dict()
    smaller.load_state_dict(without_blocks(state, find_stack(state), gone))
    for index in reversed(gone):
        del whole.body["layers"][index]
    torch.testing.assert_close(smaller(tokens), whole(tokens), rtol=0, atol=0)


def test_what_follows_in_the_same_container_moves_down() -> None:
    whole = sequential()
    state = whole.state_dict()
    stack = find_stack(state)
    assert stack.numbers == tuple(range(2, 2 + DEPTH))
    smaller = without_blocks(state, stack, {0, 3})
    del whole[2 + 3], whole[2]
    assert smaller.keys() == whole.state_dict().keys()
    assert all(torch.equal(smaller[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_state_dict_that_begins_with_numbers() -> None:
    state = nn.ModuleList(Block() for _ in range(3)).state_dict()
    assert find_stack(state).container == ""
    assert without_blocks(state, find_stack(state), [1]).keys() == {n for n in state if not n.startswith("2.")}


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.data())
def test_stages_are_those_of_the_pipeline(widths: list[int], data: st.DataObject) -> None:
    model = nn.ModuleDict({"stack": nn.ModuleList(nn.Sequential(nn.Linear(w, 3), nn.Linear(3, 3)) for w in widths)})
    stages = data.draw(st.integers(1, len(widths)))
    expected = cut(estimate_costs(find_blocks(model).blocks), stages)
    assert stage_blocks(find_stack(model.state_dict(), "stack"), stages) == expected


def test_several_stacks_need_a_name() -> None:
    model = nn.ModuleDict({name: nn.ModuleList(Block() for _ in range(n)) for name, n in (("encoder", 2), ("dec", 3))})
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"2 block stacks.*--blocks.*encoder: 2 blocks.*dec: 3 blocks"):
        find_stack(state)
    assert len(find_stack(state, "dec")) == 3
    assert len(find_stack(state, "dec.0.parts")) == 2
    with pytest.raises(ValueError, match=r"no numbered blocks below 'decoder'.*encoder"):
        find_stack(state, "decoder")


def test_a_compiled_model_is_named_as_without_the_wrapper() -> None:
    state = {f"model._orig_mod.{name}": tensor for name, tensor in Model().state_dict().items()}
    assert find_stack(state).container == "model._orig_mod.body.layers"
    assert find_stack(state, "model.body.layers") == find_stack(state)


def test_plain_layers_are_a_stack_where_there_is_no_better_one() -> None:
    state = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)), nn.Linear(3, 1)).state_dict()
    assert find_stack(state).numbers == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="no block stack"):
        find_stack(nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize(
    ("gone", "reason"),
    [({5}, "no block 5; the 5 blocks are 0 to 4"), ({-1}, "no block -1"), (range(5), "all 5"), ((), "nothing")],
)
def test_blocks_that_cannot_be_left_out(gone: set[int], reason: str) -> None:
    state = Model().state_dict()
    with pytest.raises(ValueError, match=reason):
        without_blocks(state, find_stack(state), gone)


def test_fewer_blocks_than_stages() -> None:
    with pytest.raises(ValueError, match="5 blocks cannot fill 6 stages"):
        stage_blocks(find_stack(Model().state_dict()), 6)


CONFIGS = [
    ({"num_hidden_layers": 4, "hidden_size": 4}, {"num_hidden_layers": 2, "hidden_size": 4}),
    ({"n_layer": 4, "layer_types": ["a", "b", "c", "d"]}, {"n_layer": 2, "layer_types": ["a", "d"]}),
    ({"n_layer": 4, "mlp_only_layers": [1, 3]}, {"n_layer": 2, "mlp_only_layers": [1]}),
    ({"n_layer": 4, "first_k_dense_replace": 3}, {"n_layer": 2, "first_k_dense_replace": 1}),
    (
        {"a": 4, "text": {"num_layers": 4}, "vision": {"num_layers": 9}},
        {"a": 4, "text": {"num_layers": 2}, "vision": {"num_layers": 9}},
    ),
    (
        {"n_layer": 4, "layer_types": list("abab"), "full_attention_interval": 2},
        {"n_layer": 2, "layer_types": ["a", "b"], "full_attention_interval": 2},
    ),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS)
def test_configurations_say_what_is_left(config: dict[str, Any], expected: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    resized, changed = resize_config(config, 4, [0, 3])
    assert (resized, config) == (expected, before)
    tops = {name.partition(".")[0] for name in changed}
    assert tops == {name for name in config if config[name] != expected[name]}


def test_kinds_that_follow_from_the_index_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"attn_layer_period=2.*index"):
        resize_config({"num_hidden_layers": 4, "attn_layer_period": 2}, 4, [0, 3])
