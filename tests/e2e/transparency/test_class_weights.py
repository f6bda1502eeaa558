"""Means over the weights of classes: batches that are balanced, or lack a class, do not show them."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.grids import all_slow_but

from ..models import TanhBlock
from ..support import DEVICE, assert_same_run, train

PIPELINE = {"num_microbatches": 4, "verbose": False}
WEIGHTS = torch.tensor([0.2, 1.0, 1.0, 5.0], device=DEVICE)
Loss = Callable[[Tensor, Tensor], Tensor]


def by_hand(output: Tensor, labels: Tensor) -> Tensor:
    weights = WEIGHTS[labels]
    return (F.cross_entropy(output, labels, reduction="none") * weights).sum() / weights.sum()


def selected(output: Tensor, labels: Tensor) -> Tensor:
    weights = WEIGHTS.index_select(0, labels)
    return torch.dot(F.cross_entropy(output, labels, reduction="none"), weights) / weights.sum()


def gathered(output: Tensor, labels: Tensor) -> Tensor:
    weights = torch.gather(WEIGHTS, 0, labels)
    return (F.cross_entropy(output, labels, WEIGHTS, reduction="none")).sum() / weights.sum()


LOSSES: dict[str, Loss] = {
    "cross_entropy": functools.partial(F.cross_entropy, weight=WEIGHTS),
    "a module": nn.CrossEntropyLoss(WEIGHTS),
    "smoothed": nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
    "nll_loss": lambda output, labels: F.nll_loss(output.log_softmax(1), labels, WEIGHTS),
    "by hand": by_hand,
    "selected": selected,
    "gathered": gathered,
}
FOLLOWS: dict[str, Loss] = {
    "even": nn.CrossEntropyLoss(torch.ones(4, device=DEVICE)),
    "a sum": lambda output, labels: F.cross_entropy(output, labels, WEIGHTS, reduction="sum") / 8,
    "of samples": lambda output, labels: F.cross_entropy(output, labels, WEIGHTS, reduction="none").mean(),
    "by hand": lambda output, labels: (F.cross_entropy(output, labels, reduction="none") * WEIGHTS[labels]).mean(),
}


class Model(LightningModule):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(TanhBlock() for _ in range(2))
        self.loss = [loss]

    def training_step(self, batch: Any, _: int) -> Tensor:
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        return self.loss[0](self.head(hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


BALANCED = {
    "balanced": [0, 3, 3, 0, 0, 3, 3, 0],
    "of equal weight": [1, 2, 2, 2, 1, 1, 2, 1],
    "of equal weights together": [1, 3, 3, 2, 1, 3, 2, 3],
}


def batches(first: list[int]) -> DataLoader[Any]:
    """Batches with such labels, and then some of which none is like the others."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(6):
        labels = torch.tensor(first) if number < 4 else torch.randint(min(first), 4, (8,), generator=generator)
        found.append([torch.randn(8, 4, generator=generator), labels])
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", all_slow_but(BALANCED, "of equal weight", "balanced"))
@pytest.mark.parametrize("name", all_slow_but(LOSSES, "cross_entropy", "smoothed", "by hand", "gathered"))
def test_weights_that_show_later(name: str, labels: str) -> None:
    data = batches(BALANCED[labels])
    found = train(lambda: Model(LOSSES[name]), data, 3, PIPELINE, max_steps=6)
    assert_same_run(found, train(lambda: Model(LOSSES[name]), data, 1, max_steps=6))


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_follows_from_samples_is_cut(name: str) -> None:
    data, strategy = batches(BALANCED["balanced"]), {**PIPELINE, "microbatches": "batch"}
    found = train(lambda: Model(FOLLOWS[name]), data, 3, strategy, max_steps=6)
    assert_same_run(found, train(lambda: Model(FOLLOWS[name]), data, 1, max_steps=6))
