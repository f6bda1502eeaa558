"""What the callbacks share: their strategy, and logging between the Trainer's own logging steps."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from ..strategies import SkipPipeStrategy


def strategy_of(trainer: Trainer, callback: Callback) -> SkipPipeStrategy:
    """Return the Trainer's strategy; TypeError when it runs no pipeline."""
    if not isinstance(trainer.strategy, SkipPipeStrategy):
        raise TypeError(
            f"{type(callback).__name__} is for pipelines, and this Trainer runs {type(trainer.strategy).__name__}: "
            "use Trainer(strategy=SkipPipeStrategy(...)) or leave the callback out"
        )
    return trainer.strategy


def log_now(trainer: Trainer, module: LightningModule, metrics: Mapping[str, float]) -> None:
    """Log metrics of this very step; by itself the Trainer would drop them between its own logging steps."""
    for name, value in metrics.items():
        module.log(name, value, on_step=True, on_epoch=False, logger=False, batch_size=1)
    to_loggers(trainer, metrics)


def to_loggers(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Give metrics to the Trainer's loggers alone, at any moment."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.fit_loop.epoch_loop._batches_that_stepped)
