"""Gradients that an optimizer step has used and the workers have dropped since, where one process still has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor

from ...engine.errors import SkipPipeError
from .remote import Slot


class GoneGradient(Tensor):
    """Says that there was a gradient, may be dropped or zeroed, and raises where its value is asked for."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),  # Any: whatever the torch function takes
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in _HARMLESS:
            raise SkipPipeError(
                "the gradients of blocks on a pipeline's workers are dropped when the next training step begins. Read "
                "them before that: in on_before_optimizer_step, on_train_batch_end (in a loop of your own: before the "
                "next call of the model)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_HARMLESS: Final = {Tensor.zero_, Tensor.detach_, Tensor.requires_grad_, torch._foreach_zero_} | {
    getattr(Tensor, name).__get__ for name in ("grad_fn", "shape", "dtype")
}


def gone(slot: Slot) -> GoneGradient:
    """Return what stands for the gradient of a remote parameter."""
    return slot.form.as_subclass(GoneGradient)
