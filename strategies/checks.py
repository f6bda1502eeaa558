"""What a pipeline cannot do, said before training starts, with the reason and the way out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from ..driver.capture.remote import is_remote
from ..driver.optimizer import RemoteOptimizer
from ..engine.errors import SkipPipeError


def check_fit(module: LightningModule, trainer: Trainer) -> None:
    """Raise when ``trainer.fit(module)`` asks for what a pipeline cannot do."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise SkipPipeError("training_step(dataloader_iter) cannot be microbatched; take a batch instead")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            raise SkipPipeError(
                f"the callback {type(callback).__name__} changes the structure of the blocks while they train, but "
                "they are on the workers, which keep the structure they were handed; prune the model "
                "before fit (torch.nn.utils.prune), whose masks the workers apply, or after it"
            )


def far_reaching(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the one of several optimizers that steps what is on workers; the first if none does.

    Raises:
        SkipPipeError: Several do.
    """
    far = [each for each in optimizers if any(is_remote(p) for group in each.param_groups for p in group["params"])]
    if len(far) > 1:
        raise SkipPipeError(
            f"{len(far)} of the {len(optimizers)} optimizers step parameters of the blocks, but the workers step one: "
            "let one optimizer have all parameters of the blocks, in groups of their own (the others may have the rest "
            "of the model), or name a stack that one optimizer has with blocks=..."
        )
    return (far or list(optimizers))[0]


def check_replaceable(optimizers: Sequence[Optimizer], *, is_continued: bool) -> None:
    """Raise when ``trainer.strategy.optimizers`` is set, while a model is spread, to what a pipeline cannot step."""
    if len(optimizers) > 1:
        raise SkipPipeError(
            f"trainer.strategy.optimizers was set to {len(optimizers)} optimizers during fit, none of which is the one "
            "that the workers have parts of; replace a single one by a single one"
        )
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
    if remote is not None and not any(each is remote.optimizer for each in optimizers):
        raise SkipPipeError(
            "the list trainer.strategy.optimizers was changed in place, of which neither Lightning nor the workers "
            "hear; assign another list (trainer.strategy.optimizers = [optimizer])"
        )
