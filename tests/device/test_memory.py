"""After a run, however it ends, no process keeps anything in the memory of a device."""

import gc
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from tests.e2e.support import trainer_for
from tests.grids import slow

WIDTH, ROWS = 32, 8
CONFIG = SkipPipeConfig(num_stages=2, num_microbatches=2, verbose=False)
LIMIT_S = 20.0


def _in_use() -> list[int]:
    return [torch.accelerator.memory_allocated(index) for index in range(torch.accelerator.device_count())]


def _most_in_use() -> int:
    return max(torch.accelerator.max_memory_allocated(index) for index in range(torch.accelerator.device_count()))


def _watch(folder: str) -> None:
    """Let this process write down again and again what it has in use, until the folder is gone."""
    file = Path(folder, str(os.getpid()))
    if file.exists():
        return
    file.write_text(json.dumps((_most_in_use(), _in_use())))
    threading.Thread(target=_keep_writing, args=(file,), daemon=True).start()


def _keep_writing(file: Path) -> None:
    unfinished = file.with_suffix(".unfinished")
    while file.exists():
        unfinished.write_text(json.dumps((_most_in_use(), _in_use())))
        unfinished.rename(file)
        time.sleep(0.02)


class Block(nn.Module):
    def __init__(self, folder: str, fails: bool = False) -> None:
        super().__init__()
        self.folder = folder
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.fails = fails

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        _watch(self.folder)
        if self.fails and self.training and mask.sum() == 0:
            raise ValueError("of a block")
        return hidden + torch.tanh(self.linear(hidden)) * mask


class Net(nn.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Block(folder) for _ in range(4))

    def forward(self, batch: Tensor) -> Tensor:
        hidden, mask = self.embed(batch), (batch[:, :1] > 0).float()
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(hidden).square().mean()  # type: ignore[no-any-return]


class Module(LightningModule):
    def __init__(self, folder: str, fails: bool = False) -> None:
        super().__init__()
        self.net = Net(folder)
        self.fails = fails

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss = self.net(batch)
        if self.fails and number == 1:
            raise ValueError("of the user")
        return loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def _data() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(3 * ROWS, 4), batch_size=ROWS)


def _trainer() -> Any:
    return trainer_for(3, {"num_microbatches": 2}, max_steps=3, gradient_clip_val=0.1)


def a_fit(folder: str) -> None:
    _trainer().fit(Module(folder), _data())


def a_failed_fit(folder: str) -> None:
    with pytest.raises(ValueError, match="of the user"):
        _trainer().fit(Module(folder, fails=True), _data())


def a_plain_loop(folder: str) -> None:
    model = Net(folder).to("sim:0")
    optimizer = torch.optim.AdamW(model.parameters())
    with TorchPipeline(model, optimizer, CONFIG):
        for batch in _data():
            optimizer.zero_grad()
            model(batch.to("sim:0")).backward()
            optimizer.step()


def a_failed_loop(folder: str) -> None:
    model = Net(folder).to("sim:0")
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        with TorchPipeline(model, optimizer, CONFIG):
            model(torch.randn(ROWS, 4, device="sim:0")).backward()
            raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        train()


def a_failing_block(folder: str) -> None:
    module, batches = Module(folder), _data().dataset.clone()  # type: ignore[attr-defined]
    module.net.blocks[3].fails = True
    batches[:, 0] = torch.arange(len(batches)) < 2 * ROWS  # the last batch is masked
    with pytest.raises(ValueError, match="of a block"):
        _trainer().fit(module, DataLoader(batches, batch_size=ROWS))


@pytest.mark.parametrize("run", [a_fit, slow(a_failed_fit), a_failing_block, a_plain_loop, a_failed_loop])
def test_nothing_stays(run: Callable[[str], None], tmp_path: Path) -> None:
    gc.collect()
    before = _in_use()
    run(str(tmp_path))
    gc.collect()
    assert all(now <= then for now, then in zip(_in_use(), before, strict=True))  # less: of tests before
    workers = [file for file in tmp_path.iterdir() if file.name.isdecimal() and file.name != str(os.getpid())]
    assert len(workers) == 2
    deadline_s = time.monotonic() + LIMIT_S  # a worker rests first
    while (found := [_read(file) for file in workers]) and time.monotonic() < deadline_s:
        if not any(any(in_use) for _, in_use in found):
            break
        time.sleep(0.05)
    for file in workers:
        file.unlink()
    assert [in_use for _, in_use in found] == [[0] * len(before)] * 2
    assert min(most for most, _ in found) > 4 * 2 * WIDTH * WIDTH * 4  # weights, gradients, and two of AdamW


def _read(file: Path) -> tuple[int, list[int]]:
    most, in_use = json.loads(file.read_text())
    return most, in_use
