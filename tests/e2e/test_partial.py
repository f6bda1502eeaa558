"""Partial and reordered paths equal one process that follows the same paths, for both gradient scales."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.schedule import Path, Schedule, list_schedule
from tests.grids import all_slow_but, slow

from .models import Block, next_token_loss, tokens
from .modules import loader
from .support import assert_same_run, train

MICROBATCHES = 4
BATCH = 10  # microbatches of 3, 3, 2, 2
STEPS = 6
BLOCKS_PER_STAGE = 2

PATHS = {
    "skips": ["0: 1@1 2@2", "0: 1@1 3@3", "0: 2@2 3@3", "0: 1@1 3@3"],
    "swaps": ["0: 2@2 1@1 3@3", "0: 1@1 3@3 2@2", "0: 1@1 2@2 3@3", "0: 2@2 1@1 3@3"],
    "skips and swaps": ["0: 2@2 1@1", "0: 3@3 2@2", "0: 3@3", "0: 1@1 2@2 3@3"],
    "a stage nobody visits": ["0: 1@1", "0: 3@3", "0: 1@1 3@3", "0: 3@3"],
}


class Model(LightningModule):
    """Follows ``paths`` itself when it has any, microbatch by microbatch."""

    def __init__(self, paths: list[Path] | None = None, scale: str = "batch") -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3 * BLOCKS_PER_STAGE))
        self.head = nn.Linear(16, 32)
        self.paths, self.scale = paths, scale

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.paths is None:
            return self.loss_on(batch, range(len(self.blocks)))
        pieces = batch.tensor_split(MICROBATCHES)
        weights = [len(piece) / len(batch) for piece in pieces]
        self.visited = [sum(w for w, p in zip(weights, self.paths, strict=True) if s in p.stages) for s in (1, 2, 3)]
        losses = [self.loss_on(piece, self.route(path)) for piece, path in zip(pieces, self.paths, strict=True)]
        return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))

    def loss_on(self, piece: Tensor, route: Any) -> Tensor:
        hidden = self.embedding(piece)
        for block in route:
            hidden = self.blocks[block](hidden)
        return next_token_loss(self.head(hidden), piece)

    def route(self, path: Path) -> list[int]:
        size = BLOCKS_PER_STAGE
        return [block for stage in path.stages for block in range((stage - 1) * size, stage * size)]

    def on_after_backward(self) -> None:
        if self.paths is None or self.scale == "batch":
            return
        for index, block in enumerate(self.blocks):
            share = self.visited[index // BLOCKS_PER_STAGE]
            for parameter in block.parameters():
                if parameter.grad is not None:
                    parameter.grad /= share

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss_on(batch, range(len(self.blocks))))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def schedule_of(paths: list[Path], replicas: int = 1) -> Schedule:
    placement = ((0,), (1, 4) if replicas == 2 else (1,), (2,), (3,))
    return list_schedule(placement, tuple(paths), driver_in_flight=4)


def compare(paths: list[Path], scale: str, replicas: int = 1) -> None:
    data, validation = loader(tokens(BATCH * STEPS), BATCH), loader(tokens(BATCH, seed=1), BATCH)
    options: dict[str, Any] = {"max_steps": STEPS, "val_data": validation}
    plain = train(lambda: Model(paths, scale), data, 1, **options)
    strategy = {"schedule": schedule_of(paths, replicas), "gradient_scale": scale}
    pipeline = train(Model, data, 3 + replicas, strategy, **options)
    assert_same_run(pipeline, plain)
    found, expected = (run.trainer.callback_metrics["val_loss"] for run in (pipeline, plain))
    torch.testing.assert_close(found, expected)  # validation visits every stage


@pytest.mark.parametrize("scale", ["batch", "visit"])
@pytest.mark.parametrize("name", all_slow_but(PATHS, "skips and swaps", "a stage nobody visits"))
def test_paths_equal_their_emulation(name: str, scale: str) -> None:
    compare([Path.parse(text) for text in PATHS[name]], scale)


@pytest.mark.parametrize("scale", [slow("batch"), "visit"])
def test_replicas_share_the_visits(scale: str) -> None:
    compare([Path.parse(text) for text in ("0: 1@1 2@2", "0: 1@4 3@3", "0: 2@2 3@3", "0: 1@4 2@2 3@3")], scale, 2)
