"""Four ways in which a run differed without a word: each with one process beside it."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.models import TanhBlock as Block
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train

DATA = torch.randn(24, 6, 4, generator=torch.Generator().manual_seed(0))


class Spectral(Block):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.linear)


class Halving(Block):
    """Changes its input in place."""

    def forward(self, hidden: Tensor) -> Tensor:
        hidden.mul_(0.5)
        return super().forward(hidden)


class Pooling(Block):
    """Gives one position less than it gets."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward((hidden[:, 1:] + hidden[:, :-1]) / 2)


class Cell(nn.Module):
    """Uses its weights once for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.stack([self.cell(hidden[:, at]) for at in range(hidden.shape[1])], 1)


class Model(LightningModule):
    def __init__(self, block: Callable[[], nn.Module], draw: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([block() for _ in range(4)])
        self.draw = draw
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.clear()
        hidden = self.embed(batch) * (1 + self.draw())
        for block in self.blocks:
            hidden = block(hidden)
        loss = F.mse_loss(self.head(hidden.mean(1)), batch.sum((1, 2))[:, None])
        return loss + sum(each.pow(2).mean() for each in self.seen)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(make: Callable[[], LightningModule], devices: int = 3, num_microbatches: int = 4, **trainer: Any) -> Any:
    pipe = {"num_microbatches": num_microbatches, "verbose": False} if devices > 1 else None
    return train(make, loader(DATA), devices, pipe, max_steps=3, **trainer)


class Replacing(Model):
    def on_fit_start(self) -> None:
        with torch.no_grad():
            for block in self.blocks:
                weight = torch.arange(64.0, device=self.device).sin().view(8, 8)
                block.linear.weight = weight  # a parametrization takes it by Tensor.set_


def test_memory_that_another_tensor_gives_goes_to_the_worker() -> None:
    """With one microbatch: a spectral norm counts how often it is used."""
    found = fit(lambda: Replacing(Spectral), num_microbatches=1)
    assert_same_run(found, fit(lambda: Replacing(Spectral), devices=1))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_draws_before_blocks_that_change_the_form_are_the_batchs(draw: Callable[[], float]) -> None:
    def run(devices: int) -> Any:
        random.seed(0)
        np.random.seed(0)
        return fit(lambda: Model(Pooling, draw), devices)

    assert_same_run(run(3), run(1))


class Watching(Model):
    """Keeps what one block returns: the next one changes it."""

    def __init__(self, block: Callable[[], nn.Module], *, pre: bool) -> None:
        super().__init__(block)
        seen = self.seen
        if pre:
            self.blocks[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        else:
            self.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))


@pytest.mark.parametrize("pre", [False, True])
def test_what_a_hook_keeps_and_a_block_changes_is_refused(pre: bool) -> None:
    with pytest.raises(SkipPipeError, match=r"blocks.2 changes its input in place, on a worker, and a hook of yours"):
        fit(lambda: Watching(Halving, pre=pre))
    assert_same_run(fit(lambda: Watching(Block, pre=pre)), fit(lambda: Watching(Block, pre=pre), devices=1))


class Noting(Model):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        cell: Any = self.blocks[0]
        NOTED.append(cell.cell.weight_ih.grad.clone())


NOTED: list[Tensor] = []


def test_autocast_keeps_casts_as_in_one_process() -> None:
    """Lightning's does not: gradients of the uses of one weight then add up in float32, to the bit."""
    noted = []
    for devices in (1, 3):
        NOTED.clear()
        fit(lambda: Noting(Cell), devices, num_microbatches=1, precision="bf16-mixed")
        noted.append(torch.stack(NOTED))
    assert torch.equal(*noted)
