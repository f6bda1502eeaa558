"""Lightning scales the loss and unscales what it sees; these make it reach what is on the workers."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision

from ..driver.loss_scaling import unscale_everywhere, unscale_locally
from ..driver.optimizer import RemoteOptimizer


def scale_everywhere(precision: Precision, remote: RemoteOptimizer) -> None:
    """Let the scaler of ``precision="16-mixed"``, if that is used, unscale what is on the workers too."""
    scaler = getattr(precision, "scaler", None)
    if scaler is not None:
        unscale_everywhere(scaler, remote)


def scale_locally(precision: Precision) -> None:
    """Undo :func:`scale_everywhere`."""
    scaler = getattr(precision, "scaler", None)
    if scaler is not None:
        unscale_locally(scaler)


def scale_of_backward(trainer: Trainer) -> float:
    """Return what the backward of a batch's loss brings: one over the accumulated batches, times the loss scale."""
    share = 1 / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return share if scaler is None else share * float(scaler.get_scale())
