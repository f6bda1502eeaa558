"""Draw what a pipeline did in one training step, above what the simulator predicts: the picture in the README.

python examples/draw_timeline.py                       # writes docs/timeline.png
python examples/draw_timeline.py --schedule 1f1b       # every microbatch visits every stage in order
python examples/draw_timeline.py --output step.svg

The blocks sleep instead of computing, so that the picture shows the schedule and not how busy this machine is.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.schedule import CostModel, Path, Schedule, draw, fit_costs, full_schedule, list_schedule, simulate
from skippipe_plugin.strategies import SkipPipeStrategy

FORWARD_S = 0.03
NUM_STAGES, NUM_MICROBATCHES = 5, 8
WAYS = ("1 2 3 5", "1 2 3 4", "2 3 4 5", "2 1 3 5", "1 3 2 4", "2 3 5 4", "3 1 4 5", "1 2 4 5")
"""The stages that each microbatch visits: one of five is left out, and some are swapped with their neighbour."""


class Emulated(torch.autograd.Function):
    """Takes its time in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(2 * FORWARD_S)
        return gradient


class Block(nn.Module):
    """A residual layer that takes as long as a large one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return Emulated.apply(hidden + self.linear(hidden))


class Model(LightningModule):
    """An embedding, a block per stage, a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(NUM_STAGES))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.embedding(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        time.sleep(FORWARD_S / 3)
        return self.head(hidden).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def schedule_of(name: str) -> Schedule:
    """Return an exact schedule by its name, or the partial one of ``WAYS``."""
    if name != "partial":
        return full_schedule(name, num_stages=NUM_STAGES, num_microbatches=NUM_MICROBATCHES)
    paths = [Path.parse("0: " + " ".join(f"{stage}@{stage}" for stage in way.split())) for way in WAYS]
    placement = [[rank] for rank in range(NUM_STAGES + 1)]
    cost = CostModel.uniform(
        NUM_STAGES, NUM_STAGES + 1, forward_s=FORWARD_S, backward_s=2 * FORWARD_S, loss_s=FORWARD_S / 3, latency_s=1e-3
    )
    return list_schedule(placement, paths, cost=cost, driver_in_flight=NUM_MICROBATCHES, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=["partial", "gpipe", "1f1b"], default="partial")
    parser.add_argument("--output", default=FilePath(__file__).parents[1] / "docs/timeline.png", type=FilePath)
    arguments = parser.parse_args()
    schedule = schedule_of(arguments.schedule)
    strategy = SkipPipeStrategy(schedule=schedule)
    strategy.record_timeline = True
    trainer = Trainer(
        accelerator="cpu",
        devices=NUM_STAGES + 1,
        strategy=strategy,
        max_steps=3,  # the first ones also warm up
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(4 * 3 * NUM_MICROBATCHES, 32))
    trainer.fit(Model(), DataLoader(data, batch_size=4 * NUM_MICROBATCHES))
    measured = strategy.timeline
    assert measured is not None
    predicted = replace(simulate(schedule, fit_costs(measured, schedule)), label="predicted from its median costs")
    draw([measured, predicted], arguments.output, trace=(0, 3), dpi=100)
    print(measured.table(), predicted.table(), sep="\n\n")


if __name__ == "__main__":
    main()
