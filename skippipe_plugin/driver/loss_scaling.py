"""A loss scaler of ``torch.amp`` whose decision is one for all: what it unscales and looks at is on the workers, too.

The scaler stays the user's, with its one scale and its one history, on the driver. Gradients come back scaled from the
start, as those of a loss that is multiplied; before a step the workers unscale theirs and say whether all are finite.
A step that the scaler leaves out is then left out everywhere, since workers step only when the driver's optimizer does.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..engine.errors import SkipPipeError
from .capture.ordinary import StandIn
from .optimizer import RemoteOptimizer

_UNSCALE = "_unscale_grads_"
"""The method of a scaler at which all ways to unscale meet."""


def unscale_everywhere(scaler: GradScaler, remote: RemoteOptimizer) -> None:
    """Let ``scaler`` unscale and check what the workers have of ``remote``, wherever it does so for the optimizer.

    Raises:
        SkipPipeError: It is a scaler, or an optimizer, that unscales in a way of its own.
    """
    if not scaler.is_enabled():
        return
    check_scaler(scaler)
    step = inspect.signature(remote.optimizer.step).parameters
    if getattr(remote.optimizer, "_step_supports_amp_scaling", False) and "grad_scaler" in step:
        raise SkipPipeError(
            f"{type(remote.optimizer).__name__}.step is given the loss scaler (grad_scaler) to unscale gradients by "
            "itself, which its parts on the workers cannot have; use an optimizer whose step takes no grad_scaler, or "
            "bfloat16, which needs no scaler"
        )
    scaler.__dict__[_UNSCALE] = StandIn(scaler, _UNSCALE, functools.partial(_unscale, scaler, remote))
    remote.unscales = True


def unscale_locally(scaler: GradScaler) -> None:
    """Undo :func:`unscale_everywhere`."""
    scaler.__dict__.pop(_UNSCALE, None)


def check_scaler(scaler: GradScaler) -> None:
    """Raise unless ``scaler`` unscales as ``torch.amp.GradScaler`` does."""
    kind = type(scaler)
    if not isinstance(scaler, GradScaler) or any(
        getattr(kind, name) is not getattr(GradScaler, name) for name in ("unscale_", _UNSCALE)
    ):
        raise SkipPipeError(
            f"{kind.__name__} unscales gradients in a way of its own, which workers do not know; use "
            "torch.amp.GradScaler, or bfloat16, which needs no scaler"
        )


def _unscale(
    scaler: GradScaler,
    remote: RemoteOptimizer,
    optimizer: Optimizer,
    inv_scale: Tensor,
    found_inf: Tensor,
    allow_fp16: bool,
) -> dict[torch.device, Tensor]:
    """Stand for ``GradScaler._unscale_grads_``: return by device whether gradients overflowed, anywhere."""
    own = functools.partial(getattr(GradScaler, _UNSCALE), scaler, optimizer, inv_scale, found_inf, allow_fp16)
    if optimizer.param_groups is not remote.optimizer.param_groups:
        return own()  # type: ignore[no-any-return]
    is_left_to_step = allow_fp16  # a fused step multiplies by itself; here it is only asked what is finite
    if is_left_to_step and hasattr(optimizer, "grad_scale"):
        raise SkipPipeError(
            f"{type(optimizer).__name__}.grad_scale is set, by which a fused step divides gradients once more than the "
            "workers know of; divide the loss instead, or set fused=False"
        )
    overflowed = remote.unscale(1.0 / scaler.get_scale() if is_left_to_step else float(inv_scale))
    with remote.unseen():
        found: dict[torch.device, Tensor] = own()
    there = overflowed()
    if there is not None:
        found.setdefault(found_inf.device, found_inf).add_(float(there))
    return found
