"""Lightning's modules zero the gradients that they see; these make them reach those on the workers."""

from __future__ import annotations

import functools

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..driver.backward import GradientControl
from ..driver.capture.ordinary import StandIn


def zero_everywhere(module: LightningModule | None, gradients: GradientControl) -> None:
    """Let ``module.zero_grad()`` zero on the workers too, and let these keep gradients as long as the hooks ask for.

    Lightning's own hooks zero before gradients are added, always; where a hook is overridden, or the step itself zeroes
    (manual optimization), nothing is sure. StochasticWeightAveraging looks at the data once more for the statistics of
    BatchNorm, without a backward: Lightning steps at its end with the gradients of the step before.
    """
    assert module is not None
    hooks = ("optimizer_step", "optimizer_zero_grad")
    own = any(is_overridden(hook, module, LightningModule) for hook in hooks)
    averages = any(isinstance(each, StochasticWeightAveraging) for each in module.trainer.callbacks)  # type: ignore[attr-defined]
    gradients.keeps_stepped = own or averages or not module.automatic_optimization
    module.__dict__["zero_grad"] = StandIn(module, "zero_grad", functools.partial(_zero, module, gradients))


def zero_locally(module: LightningModule | None) -> None:
    """Undo :func:`zero_everywhere`."""
    if module is not None:
        module.__dict__.pop("zero_grad", None)


def _zero(module: LightningModule, gradients: GradientControl, set_to_none: bool = True) -> None:
    with gradients.copies.unseen():
        type(module).zero_grad(module, set_to_none)
    gradients.zero(set_to_none)
