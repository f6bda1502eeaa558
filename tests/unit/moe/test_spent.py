"""The share of the blocks' compute that was spent, against counting by hand."""

import pytest
import torch
from torch import nn

from skippipe_plugin.moe import MoELayer, NullExperts, RouterStatistics, attach
from skippipe_plugin.moe.spent import BlockSize, block_size, spent_share
from tests.unit.moe.families import build, tokens


def test_a_block_is_its_dense_part_and_the_chosen_experts() -> None:
    block = nn.ModuleDict({"mix": nn.Linear(8, 8, bias=False), "moe": MoELayer(8, 12, 4, top_k=2)})
    expert = 3 * 8 * 12
    size = block_size(block, "blocks.3")
    assert size == BlockSize(8 * 8 + 4 * 8, {"blocks.3.moe.routers.0": (expert, 2)})
    assert size.whole == 8 * 8 + 4 * 8 + 2 * expert


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_models_of_transformers_are_measured(family: str) -> None:
    model = build(family)
    sizes = [block_size(block, f"model.layers.{index}") for index, block in enumerate(model.model.layers)]
    attached = attach(model)
    model(input_ids=tokens())
    statistics = {name: hook.take() for name, hook in attached.hooks.items()}
    assert {name for size in sizes for name in size.experts} == statistics.keys()
    assert spent_share(sizes, [1.0] * len(sizes), statistics) == pytest.approx(1.0)


def test_skipping_and_null_experts_multiply() -> None:
    """Half of the tokens visit, and of their two slots one is empty."""
    sizes = [BlockSize(100, {"a": (50, 2)}), BlockSize(100, {"b": (50, 2)})]
    half = RouterStatistics(torch.tensor([6, 4]), num_tokens=10, num_empty=10)
    whole = RouterStatistics(torch.tensor([10, 10]), num_tokens=10)
    assert spent_share(sizes, [0.5, 1.0], {"a": half, "b": whole}) == pytest.approx((0.5 * 150 + 200) / 400)
    assert spent_share(sizes, [0.5, 1.0], {}) == pytest.approx(0.75)


def test_null_experts_cost_nothing() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 12, 4, top_k=3, router=NullExperts(num_null=4))
    attached = attach(layer)
    layer(torch.randn(100, 8))
    statistics = {f"moe.{name}": hook.take() for name, hook in attached.hooks.items()}
    (seen,) = statistics.values()
    assert seen.num_empty > 0
    size = block_size(layer, "moe")
    expected = (size.dense + 288 * (3 - seen.num_empty / 100)) / size.whole
    assert spent_share([size], [1.0], statistics) == pytest.approx(expected)
