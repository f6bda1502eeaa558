"""What a step can reach through its Trainer, and change: callbacks, data, optimizers and what a user has put there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from lightning.pytorch import Trainer
from torch.utils import _pytree as pytree

_METRICS: Final = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
_LOADERS: Final = ("train_dataloader", "val_dataloaders", "test_dataloaders", "predict_dataloaders")
_MOST_LOADERS: Final = 16


def in_reach(trainer: Trainer) -> dict[str, Any]:  # Any: whatever the user keeps there
    """Return by name what a step reaches through ``trainer``; Lightning's own objects are not looked into later."""
    found: dict[str, Any] = {"trainer": vars(trainer)}
    found |= {f"trainer.callbacks[{index}]": each for index, each in enumerate(getattr(trainer, "callbacks", ()))}
    found |= {f"trainer.optimizers[{index}]": each for index, each in enumerate(trainer.optimizers)}
    configs = enumerate(trainer.lr_scheduler_configs)
    found |= {f"trainer.lr_scheduler_configs[{index}].scheduler": each.scheduler for index, each in configs}
    found["trainer.datamodule"] = getattr(trainer, "datamodule", None)
    found |= {f"trainer.{name}": getattr(trainer._logger_connector, f"_{name}", None) for name in _METRICS}
    return found | dict(_datasets(trainer))


def _datasets(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    for name in _LOADERS:
        loaders = pytree.tree_leaves(getattr(trainer, name, None))[:_MOST_LOADERS]
        for loader in loaders:
            dataset = getattr(loader, "dataset", None)
            while dataset is not None:
                yield f"trainer.{name}.dataset", dataset
                dataset = getattr(dataset, "dataset", None)  # of a Subset
