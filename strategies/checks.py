"""What a pipeline cannot do, said before training starts, with the reason and the way out."""

from __future__ import annotations

import inspect

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ..engine.errors import SkipPipeError

_READERS_OF_WEIGHTS = {
    "StochasticWeightAveraging": "averages",
    "WeightAveraging": "averages",
    "ModelPruning": "prunes",
}
"""Callbacks of Lightning that work on the weights while it trains; by name, because older versions lack some."""


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
        for name in {cls.__name__ for cls in type(callback).__mro__} & _READERS_OF_WEIGHTS.keys():
            raise SkipPipeError(
                f"the callback {type(callback).__name__} {_READERS_OF_WEIGHTS[name]} the weights on the driver, but "
                "those of the blocks are on the workers; remove it, or do the same with checkpoints after the run"
            )
