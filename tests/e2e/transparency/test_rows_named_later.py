"""Arguments of blocks that name rows of the batch, which only a later batch shows, where the blocks' call is cut."""

import functools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin import SkipPipeError
from tests.e2e.support import assert_same_run, train

LATER = [
    torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]),  # out of the range of a microbatch
    torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]),  # in its range, but the samples of another
    torch.tensor([-1, -1, -1, -1, -1, -1, -1, 0]),
]


class Block(nn.Module):
    """Looks at the sample that ``other`` names, if it names one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        seen = torch.where((other >= 0)[:, None], h[other], h) if bool((other >= 0).any()) else h
        return h + torch.tanh(self.linear(seen))


class Switched(Block):
    """Looks at other samples only where the hidden states, which nobody can know before, are large."""

    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        return super().forward(h, other if bool(h.detach().abs().amax() > 20) else torch.full_like(other, -1))


class Counting(Block):
    """Has an ordinary whole number for each sample."""

    def forward(self, h: Tensor, other: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h)) * (2 + other[:, None]).float() / 8


class Model(LightningModule):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def training_step(self, batch: Any) -> Tensor:
        x, other = batch
        h = functools.reduce(lambda h, block: block(h, other), self.blocks, self.embed(x))
        return F.mse_loss(self.head(h), x.sum(1, keepdim=True))

    def validation_step(self, batch: Any) -> None:
        self.log("loss", self.training_step(batch))

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.05)


def fit(block: type[Block], later: Tensor, devices: int) -> Any:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    others = torch.cat([torch.full((8,), -1), torch.full((8,), -1), later, later])
    strategy = {"num_microbatches": 4, "microbatches": "stack"} if devices > 1 else None
    data = DataLoader(TensorDataset(x, others), batch_size=8)
    return train(lambda: Model(block), data, devices, strategy, max_steps=4)


@pytest.mark.parametrize("later", LATER, ids=["beyond", "within", "one"])
def test_the_batch_is_whole_from_then_on(later: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = fit(Block, later, 3)
    assert_same_run(found, fit(Block, later, 1))
    assert "the blocks get whole batches" in caplog.text


@pytest.mark.parametrize("later", LATER)
def test_ordinary_numbers_leave_it_cut(later: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = fit(Counting, later, 3)
    assert_same_run(found, fit(Counting, later, 1))
    assert "the blocks get whole batches" not in caplog.text


@pytest.mark.parametrize("evaluates", [False, True])
def test_what_only_hidden_states_show_says_why_it_fails(evaluates: bool) -> None:
    x = torch.cat([torch.full((8, 4), 0.1), torch.full((8, 4), 1e3)])
    others = torch.arange(8).flip(0).repeat(2)
    strategy = {"num_microbatches": 4, "microbatches": "stack"}

    data = DataLoader(TensorDataset(x, others), batch_size=8)
    first = DataLoader(TensorDataset(x[:8], others[:8]), batch_size=8)

    def fit(*settings: Any) -> Any:
        batches, val_data = (first, data) if evaluates else (data, None)
        return train(lambda: Model(Switched), batches, *settings, max_steps=2, val_data=val_data)

    with pytest.raises(SkipPipeError, match=r"a microbatch lacks those rows.*num_microbatches=1") as raised:
        fit(3, strategy)
    assert isinstance(raised.value.__cause__, IndexError)
    assert_same_run(fit(3, strategy | {"num_microbatches": 1}), fit(1))
