"""A measured step has the simulator's type and the schedule's actions, so that both can be laid side by side."""

import time
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.schedule import CostModel, Timeline, full_schedule, messages, simulate
from skippipe_plugin.strategies import SkipPipeStrategy
from tests.grids import slow

pytestmark = pytest.mark.alone

FORWARD_S = 0.02


class Sleep(torch.autograd.Function):
    """Takes its time in both directions, whatever else the machine does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        time.sleep(2 * FORWARD_S)
        return gradients[0]


class SlowBlock(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return Sleep.apply(super().forward(hidden))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SlowBlock(4, 4) for _ in range(3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = batch[0]
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", [slow("gpipe"), "1f1b"])
def test_measured_and_predicted_timelines(name: str) -> None:
    strategy = SkipPipeStrategy(schedule=name, num_microbatches=4)
    strategy.record_timeline = True
    trainer = Trainer(
        accelerator="cpu",
        devices=4,
        strategy=strategy,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=8))
    measured = strategy.timeline
    assert measured is not None
    schedule = full_schedule(name, num_stages=3, num_microbatches=4)
    predicted = simulate(schedule, CostModel.uniform(3, 4, forward_s=FORWARD_S, backward_s=2 * FORWARD_S))
    for rank in range(4):
        assert [e.action for e in measured.of_rank(rank)] == list(schedule.orders[rank])
        assert {e.action for e in measured.of_rank(rank)} == {e.action for e in predicted.of_rank(rank)}
    sent = {(message.source, message.destination, message.producer) for message in messages(schedule)}
    found = {(transfer.source, transfer.destination, transfer.action) for transfer in measured.transfers}
    assert found <= sent
    assert {
        entry for entry in sent - found if entry[1] > 0
    } == set()  # no gradient goes to this driver: its input has none
    assert Timeline.from_json(measured.to_json()) == measured
    # The sleeps are a floor that holds on any machine; how far above it a run is, benchmarks/overhead.py says.
    assert measured.makespan_s >= predicted.makespan_s
    blocks = [event for event in measured.events if event.rank > 0]
    assert min(event.duration_s for event in blocks) >= FORWARD_S
