"""Lightning clips the gradients that it sees; these make it see those on the workers."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.plugins.precision import Precision
from torch.optim import Optimizer

from ..driver.optimizer import RemoteOptimizer

Clip = Callable[[Optimizer, int | float], None]


def clip_everywhere(precision: Precision, remote: RemoteOptimizer) -> None:
    """Lightning clips what it sees; the norm and the clipping must include what is on the workers."""
    clip_locally(precision)
    by_norm, by_value = precision.clip_grad_by_norm, precision.clip_grad_by_value
    precision.__dict__["clip_grad_by_norm"] = _reaching(remote, remote.clip_norm, by_norm)
    precision.__dict__["clip_grad_by_value"] = _reaching(remote, remote.clip_value, by_value)


def _reaching(remote: RemoteOptimizer, far: Callable[[float], object], near: Clip) -> Clip:
    """Return what clips the gradients of an optimizer, of the one with parts on workers by ``far``."""

    def clip(optimizer: Optimizer, clip_val: int | float) -> None:
        if getattr(optimizer, "optimizer", optimizer) is remote.optimizer:
            far(float(clip_val))
        else:
            near(optimizer, clip_val)

    return clip


def clip_locally(precision: Precision) -> None:
    """Undo :func:`clip_everywhere`."""
    precision.__dict__.pop("clip_grad_by_norm", None)
    precision.__dict__.pop("clip_grad_by_value", None)
