"""Two drivers train blocks that look at other samples, or keep something: ``keeping.py BLOCK``, a class of here.

What a driver says, and how it ends, goes to its standard output and error.
"""

import os
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skippipe_plugin.strategies import SkipPipeStrategy


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.seen: list[float] = []

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class InBuffer(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return super().forward(hidden) - self.mean


class InList(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.seen.append(float(hidden.detach().mean()))
        return super().forward(hidden) + (0.0 if self.training else sum(self.seen))


class Mixes(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) - hidden.mean(0)


class Norm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(self.norm(hidden))


class Model(LightningModule):
    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(block() for _ in range(4)))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.blocks(batch) - batch.sum(1, keepdim=True)).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    seed_everything(int(os.environ["RANK"]), verbose=False)
    strategy = SkipPipeStrategy(drivers=2, num_microbatches=2, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=4, strategy=strategy, max_steps=2, use_distributed_sampler=False, **quiet
    )
    trainer.fit(Model(globals()[sys.argv[1]]), DataLoader(torch.randn(16, 4), batch_size=8))


if __name__ == "__main__":
    main()
