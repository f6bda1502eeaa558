"""What a user's step returns: the loss in it, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..engine.errors import SkipPipeError


def loss_of(output: Any) -> Tensor | None:
    """Find the scalar loss in what ``training_step`` returned; None when it returned None."""
    if output is None:
        return None
    loss = output["loss"] if isinstance(output, Mapping) and "loss" in output else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        form = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(output).__name__
        raise SkipPipeError(
            f"training_step returned {form}; return a scalar loss, or a dict with a scalar under 'loss'"
        )
    return loss


def without_loss(output: Any) -> dict[str, Any] | None:
    """Return what ``training_step`` returned beside its loss; None when there is nothing."""
    if not isinstance(output, Mapping):
        return None
    return {key: value for key, value in output.items() if key != "loss"}


def with_loss(rest: Mapping[str, Any] | None, loss: Tensor | None) -> Any:
    """Return what ``training_step`` would have returned with another loss, given the rest of what it returned."""
    return loss if loss is None or rest is None else {**rest, "loss": loss}
