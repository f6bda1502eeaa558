"""Weights and gradients are read and written in hooks, by one driver or by several; what is found goes to a file."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from skippipe_plugin.strategies import SkipPipeStrategy


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Reading(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.notes: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        return functional.mse_loss(self.head(hidden), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_fit_start(self) -> None:
        self.load_state_dict({name: tensor * 0.5 for name, tensor in self.state_dict().items()})

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.notes.append(float(nn.utils.clip_grad_norm_(self.parameters(), 0.3)))

    def on_train_batch_end(self, *_: Any) -> None:
        self.notes.append(float(sum(tensor.sum() for tensor in self.state_dict().values())))
        for parameter in self.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        self.notes.append(float(sum(tensor.sum() for tensor in self.state_dict().values())))


def fit(folder: Path, drivers: int, rank: int) -> None:
    """Train on every ``drivers``-th sample, and note what was read."""
    seed_everything(0, verbose=False)
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs.pow(2).sum(1, keepdim=True))
    loader = DataLoader(Subset(data, range(rank, len(data), drivers)), batch_size=8 // drivers)
    strategy = SkipPipeStrategy(drivers=drivers, num_microbatches=4, verbose=False) if drivers > 1 else "auto"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options: dict[str, Any] = {"max_epochs": 1, "use_distributed_sampler": False, **quiet}
    devices = 4 if drivers > 1 else 1
    model = Reading()
    Trainer(accelerator="cpu", devices=devices, strategy=strategy, **options).fit(model, loader)
    if rank < drivers:
        (folder / f"{drivers}-{rank}").write_text(json.dumps(model.notes))


if __name__ == "__main__":
    fit(Path(sys.argv[1]), 2, int(os.environ["RANK"]))
