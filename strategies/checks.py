"""What a pipeline cannot do, said before training starts, with the reason and the way out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from ..driver.optimizer import RemoteOptimizer
from ..engine.errors import SkipPipeError


def check_fit(module: LightningModule, trainer: Trainer) -> None:
    """Raise when ``trainer.fit(module)`` asks for what a pipeline cannot do."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if not module.automatic_optimization:
        raise SkipPipeError(
            f"{type(module).__name__} sets automatic_optimization=False, but a pipeline runs forward and backward of "
            "all microbatches together; use automatic optimization, or train without the pipeline"
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise SkipPipeError("training_step(dataloader_iter) cannot be microbatched; take a batch instead")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise SkipPipeError(
                f"the callback {type(callback).__name__} changes the structure of the blocks while they train, but "
                "they are on the workers, which keep the structure they were handed; prune the model "
                "before fit (torch.nn.utils.prune), whose masks the workers apply, or after it"
            )


def check_single(optimizers: Sequence[Optimizer]) -> None:
    """Raise when there are several optimizers."""
    if len(optimizers) > 1:
        raise SkipPipeError(f"{len(optimizers)} optimizers: a pipeline steps one; give it parameter groups")


def check_replaceable(optimizers: Sequence[Optimizer], *, is_continued: bool) -> None:
    """Raise when ``trainer.strategy.optimizers`` is set, while a model is spread, to what a pipeline cannot step."""
    check_single(optimizers)
    if not optimizers:
        raise SkipPipeError(
            "trainer.strategy.optimizers was emptied during fit, and a pipeline has an optimizer to step; freeze the "
            "parameters (requires_grad_(False)) or set the learning rate to 0 instead"
        )
    if is_continued:
        raise SkipPipeError(
            "trainer.strategy.optimizers was replaced during a run of skippipe run, whose copies on other machines "
            "follow the first optimizer; change its param_groups instead, or start the run without skippipe run"
        )


def check_unreplaced(optimizers: Sequence[Optimizer], remote: RemoteOptimizer | None) -> None:
    """Raise when the list has another optimizer than the one that was given to the Trainer."""
    if remote is not None and (len(optimizers) != 1 or optimizers[0] is not remote.optimizer):
        raise SkipPipeError(
            "the list trainer.strategy.optimizers was changed in place, of which neither Lightning nor the workers "
            "hear; assign another list (trainer.strategy.optimizers = [optimizer])"
        )
