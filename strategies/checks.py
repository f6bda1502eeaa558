"""What a pipeline cannot do, said before training starts, with the reason and the way out."""

from __future__ import annotations

import inspect

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn

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
