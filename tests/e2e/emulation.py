"""One process that follows the paths of a pipeline's run, step by step: what partial runs are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from skippipe_plugin.schedule import Schedule
from skippipe_plugin.strategies import SkipPipeStrategy

from .models import next_token_loss


class Watch(Callback):
    """Notes the schedule and the visits of every training step."""

    def __init__(self) -> None:
        self.schedules: list[Schedule] = []
        self.visits: list[dict[int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        assert isinstance(trainer.strategy, SkipPipeStrategy)
        assert trainer.strategy.training_schedule is not None
        self.schedules.append(trainer.strategy.training_schedule)
        self.visits.append(trainer.strategy.visit_counts)


class OneBlockPerStage(LightningModule):
    """A language model of given blocks; with ``schedules``, one for each step, it follows their paths itself."""

    def __init__(
        self, blocks: Sequence[nn.Module], widths: tuple[int, int], schedules: Sequence[Schedule] = ()
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, widths[0])
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(widths[1], 32)
        self.schedules = schedules

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not self.schedules:
            return self.loss_on(batch, range(1, len(self.blocks) + 1))
        paths = self.schedules[batch_idx].paths
        pieces = batch.tensor_split(len(paths))
        losses = [self.loss_on(piece, path.stages) for piece, path in zip(pieces, paths, strict=True)]
        return sum(len(piece) / len(batch) * loss for piece, loss in zip(pieces, losses, strict=True))

    def loss_on(self, piece: Tensor, stages: Sequence[int]) -> Tensor:
        hidden = self.embedding(piece)
        for stage in stages:
            hidden = self.blocks[stage - 1](hidden)
        return next_token_loss(self.head(hidden), piece)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
