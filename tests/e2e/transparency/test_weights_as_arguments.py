"""A weight of a block that is on a worker is no argument for others; a copy that is read before is."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader, points
from tests.e2e.support import Run, assert_same_run, train
from tests.grids import slow


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, bias: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h)) + bias


class Sharing(LightningModule):
    """Gives every block a frozen bias of one of them."""

    def __init__(self, copy: bool) -> None:
        super().__init__()
        self.copy = copy
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Biased() for _ in range(4))
        self.blocks[2].linear.bias.requires_grad_(False)

    def training_step(self, batch: Any, _: int) -> Tensor:
        bias = self.blocks[2].linear.bias
        bias = bias.detach().clone() if self.copy else bias
        h = self.embed(batch["x"])
        for block in self.blocks:
            h = block(h, bias)
        return F.cross_entropy(self.head(h), batch["y"])

    def configure_optimizers(self) -> SGD:
        return SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


def fit(copy: bool, devices: int, **settings: Any) -> Run:
    strategy = {"num_microbatches": 4, "verbose": False, **settings} if devices > 1 else None
    return train(partial(Sharing, copy), loader(points(24)), devices, strategy, max_steps=3)


@pytest.mark.parametrize("settings", [{}, slow({"driver_stage": True}), {"microbatches": "stack"}], ids=str)
def test_a_weight_is_refused_and_its_copy_exact(settings: dict[str, Any]) -> None:
    with pytest.raises(SkipPipeError, match=r"argument .* of blocks\.0 has no values here"):
        fit(False, 3, **settings)
    assert_same_run(fit(True, 3, **settings), fit(True, 1))
