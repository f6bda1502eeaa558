"""What a step computes over the samples of its batch, and what no result of made-up hidden states shows."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError

from ..support import assert_same_run, train

PIPELINE = {"num_microbatches": 3, "verbose": False}


def batches() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.pow(2).sum(1, keepdim=True)), batch_size=8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, beside: Any = None, **named: Any) -> Tensor:
        out = h + torch.tanh(self.linear(h))
        for value in (beside, getattr(self, "factor", None), *named.values()):
            if isinstance(value, dict):
                value = value["factor"]
            if isinstance(value, Tensor) and not value.is_floating_point():
                out = out + 0.1 * h[value]
            elif value is not None:
                out = out + 0.1 * h * value
        return out


class Stepping(LightningModule):
    def __init__(self, arguments: Callable[[Any, Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.arguments = arguments

    def training_step(self, batch: Any, _: int) -> Tensor:
        arguments = self.arguments(self, batch[0])
        h = functools.reduce(lambda h, block: block(h, **arguments), self.blocks, self.embed(batch[0]))
        return F.mse_loss(self.head(h), batch[1])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.01)


def set_factor(module: Any, x: Tensor) -> dict[str, Any]:
    for block in module.blocks:
        block.factor = float(x.std())
    return {}


OVER_SAMPLES: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "spread": lambda _, x: {"beside": x.std(0).repeat(2)},
    "number": lambda _, x: {"beside": float(x.abs().mean())},
    "nested": lambda _, x: {"scales": {"factor": x.abs().amax()}},
    "neighbours": lambda _, x: {"beside": torch.cdist(x, x).argsort(1)[:, 1]},
    "centred": lambda _, x: {"beside": (x - x.mean(0)).repeat(1, 2)},
    "attribute": set_factor,
}
OF_EACH_SAMPLE: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "rows": lambda _, x: {"beside": x.std(1, keepdim=True)},
    "shared": lambda _, x: {"beside": torch.linspace(0.5, 1.0, 8), "scale": 0.9},
    "turned": lambda _, x: {"scales": {"factor": x.abs().mean(1)[None].T}},
}


@pytest.mark.parametrize("name", OVER_SAMPLES)
def test_arguments_of_blocks_computed_over_samples_are_those_of_one_process(name: str, caplog: Any) -> None:
    make = functools.partial(Stepping, OVER_SAMPLES[name])
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, batches(), 3, PIPELINE, max_steps=4)
    assert_same_run(found, train(make, batches(), 1, max_steps=4))
    assert "is another there than for the batch, computed over samples" in caplog.text
    assert ("an attribute that the step sets" if name == "attribute" else "the blocks' argument '") in caplog.text


@pytest.mark.parametrize("name", OF_EACH_SAMPLE)
def test_arguments_that_are_each_samples_own_leave_the_batch_cut(name: str, caplog: Any) -> None:
    make = functools.partial(Stepping, OF_EACH_SAMPLE[name])
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, batches(), 3, {**PIPELINE, "microbatches": "batch"}, max_steps=4)
    assert_same_run(found, train(make, batches(), 1, max_steps=4))
    assert "runs once" not in caplog.text


def test_it_is_refused_where_the_batch_must_be_cut() -> None:
    with pytest.raises(SkipPipeError, match="argument 'beside' is another there than for the batch"):
        train(
            functools.partial(Stepping, OVER_SAMPLES["number"]),
            batches(),
            3,
            {**PIPELINE, "microbatches": "batch"},
            max_steps=4,
        )
