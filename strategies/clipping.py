"""Lightning clips the gradients that it sees; these make it see those on the workers."""

from __future__ import annotations

from lightning.pytorch.plugins.precision import Precision

from ..driver.optimizer import RemoteOptimizer


def clip_everywhere(precision: Precision, remote: RemoteOptimizer) -> None:
    """Lightning clips what it sees; the norm and the clipping must include what is on the workers."""
    precision.__dict__["clip_grad_by_norm"] = lambda _, clip_val: remote.clip_norm(float(clip_val))
    precision.__dict__["clip_grad_by_value"] = lambda _, clip_val: remote.clip_value(float(clip_val))


def clip_locally(precision: Precision) -> None:
    """Undo :func:`clip_everywhere`."""
    precision.__dict__.pop("clip_grad_by_norm", None)
    precision.__dict__.pop("clip_grad_by_value", None)
