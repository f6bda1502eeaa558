"""Errors of devices on a worker: the user sees what one process would, and no later run meets their consequences."""

from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skippipe_plugin.strategies import stop_workers

from .support import trainer_for


class Block(nn.Module):
    """Has memory for so many samples, and trips over values above 1000."""

    def __init__(self, most: int = 100) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.most = most

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.device.type == "meta":
            return self.linear(hidden)
        if len(hidden) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if hidden.max() > 1000:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return self.linear(hidden).tanh()


class Module(LightningModule):
    def __init__(self, most: int = 100, last: int = 100) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(most) for _ in range(3)), Block(last))
        self.batch_size = 2

    def training_step(self, batch: Tensor) -> Tensor:
        return self.blocks(batch).square().mean()

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randn(64, 4), batch_size=self.batch_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_finder_of_batch_sizes_goes_on_after_a_worker_was_out_of_memory() -> None:
    sizes: dict[int, Any] = {}
    for devices in (1, 3):
        module = Module(last=8)
        finder = BatchSizeFinder(mode="power", steps_per_trial=1, init_val=4, max_trials=3)
        strategy = {"num_microbatches": 1} if devices > 1 else None
        trainer_for(devices, strategy, max_steps=1, callbacks=[finder]).fit(module)
        sizes[devices] = module.batch_size
    assert sizes[3] == sizes[1] == 8


def _workers() -> dict[int, psutil.Process]:
    return {each.pid: each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE}


def test_a_worker_that_can_use_its_device_no_more_is_replaced() -> None:
    stop_workers()  # others may be left of tests before, and would take its place
    good = DataLoader(torch.randn(8, 4), batch_size=4)
    trainer_for(3, {"num_microbatches": 2}, max_steps=1).fit(Module(), good)
    before = _workers()
    module = Module()
    assert isinstance(module.blocks[0], Block)
    weights = module.blocks[0].linear.weight.detach().clone()
    bad = DataLoader(torch.full((8, 4), 2000.0), batch_size=4)
    with pytest.raises(torch.AcceleratorError, match="device-side assert") as caught:
        trainer_for(3, {"num_microbatches": 2}, max_steps=1).fit(module, bad)
    assert "worker rank 1 (stage 1)" in "".join(caught.value.__notes__)
    torch.testing.assert_close(module.blocks[0].linear.weight, weights, rtol=0, atol=0)
    left = _workers()
    assert len(left) == len(before) - 1
    trainer_for(3, {"num_microbatches": 2}, max_steps=1).fit(Module(), good)
    assert left.keys() < _workers().keys()
    assert len(_workers()) == len(before)
