"""What a user's step returns: the loss in it, and the whole batch's output from the microbatches'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..driver.capture.microbatch import merge
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


def training_output(values: Sequence[Any], loss: Tensor | None, sizes: Sequence[int]) -> Any:
    """Return what ``training_step`` would have returned for the whole batch."""
    if loss is None or not isinstance(values[0], Mapping):
        return loss
    rest = [{key: value for key, value in output.items() if key != "loss"} for output in values]
    return {**merge(rest, sizes), "loss": loss}
