"""What a Trainer's data loaders tell of the batches they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, default_collate

from ..driver.capture.batches import Hint

_LOADERS: Final = {
    "training_step": "train_dataloader",
    "validation_step": "val_dataloaders",
    "test_step": "test_dataloaders",
    "predict_step": "predict_dataloaders",
}


def loader_hint(trainer: Trainer, step: str) -> Hint:
    """Return what is known of the batches that ``step`` gets."""
    held = getattr(trainer, _LOADERS[step], None)
    loaders = list(_each(held))
    sizes = {size for loader in loaders for size in _sizes(loader)}
    collates = [loader.collate_fn for loader in loaders]
    default = bool(collates) and all(each is default_collate for each in collates)
    return Hint(frozenset(sizes), default, combined=step == "training_step" and not isinstance(held, DataLoader))


def _each(loaders: Any) -> Iterator[DataLoader[Any]]:
    if isinstance(loaders, DataLoader):
        yield loaders
    elif isinstance(loaders, Mapping):
        for loader in loaders.values():
            yield from _each(loader)
    elif isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _each(loader)


def _sizes(loader: DataLoader[Any]) -> Iterator[int]:
    """Yield the size of the loader's batches, and that of its last one."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        return
    yield size
    try:
        last = len(loader.sampler) % size  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return
    if last and not loader.drop_last:
        yield last
