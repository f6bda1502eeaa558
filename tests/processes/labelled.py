"""Labels in unequal numbers, with accumulation and a last smaller batch, by one driver or two; weights go to a file.

``labelled.py FOLDER SETTINGS``: the strategy's, as JSON. With ``"packed"`` batches have rows that are of no sample, so
that they cannot be cut, of the first driver or of both, and ``microbatch_weight`` counts labels.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from skippipe_plugin.strategies import SkipPipeStrategy
from tests.e2e.models import Transformer

NUM, LENGTH, BATCH = 28, 12, 8
"""The last batch has four samples."""


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = Transformer(depth=4)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        logits = self.model(batch[0])
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[1][:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def data() -> TensorDataset:
    ids = torch.randint(1, 32, (NUM, LENGTH), generator=torch.Generator().manual_seed(1))
    kept = torch.arange(NUM)[:, None] * 5 % 9 + 2  # of each sample another number
    kept[2 * BATCH + 1 : 3 * BATCH : 2] = 0  # of the second driver's in one batch none
    return TensorDataset(ids, torch.where(torch.arange(LENGTH) < kept, ids, -100))


def num_labels(batch: Sequence[Tensor]) -> float:
    return float((batch[1][:, 1:] != -100).sum())


def with_rows(samples: list[Any]) -> list[Tensor]:
    return [*default_collate(samples), torch.zeros(3 + len(samples))]


def fit(folder: Path, drivers: int, rank: int, settings: dict[str, Any]) -> None:
    """Train on every ``drivers``-th sample."""
    settings = {**settings}
    collate = None
    if (packed := settings.pop("packed", 0)) > 0:
        settings["microbatch_weight"] = num_labels
        collate = with_rows if rank < packed else None
    seed_everything(0, verbose=False)
    own = Subset(data(), range(rank, NUM, drivers))
    strategy = SkipPipeStrategy(drivers=drivers, verbose=False, **settings) if drivers > 1 else "auto"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": 2, "use_distributed_sampler": False, **quiet}
    model = Model()
    trainer = Trainer(accelerator="cpu", devices=4 if drivers > 1 else 1, strategy=strategy, **options)
    trainer.fit(model, DataLoader(own, batch_size=BATCH // drivers, collate_fn=collate))
    if rank < drivers:
        torch.save(model.state_dict(), folder / f"{drivers}-{rank}")


if __name__ == "__main__":
    fit(Path(sys.argv[1]), 2, int(os.environ["RANK"]), json.loads(sys.argv[2]))
