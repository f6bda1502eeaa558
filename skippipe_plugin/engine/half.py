"""Gradients of weights that autocast computes in float16: over a batch they overflow as they do in one process.

Gradients of microbatches are added up in float32, which has room for sums that have none in float16. A loss scaler
looks for such an overflow: without it the scale would grow further, and other steps would be skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

_TOO_LARGE: Final = 65520.0
"""From here on float16 rounds to infinity."""
_VIEWS: Final = ("TBackward", "Transpose", "Permute", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Expand")
"""Beginnings of the names of nodes that hand gradients on as they are."""


def computed_in_half(outputs: Iterable[Tensor]) -> set[int]:
    """Return the ids of the parameters in float32 whose gradients the backward of ``outputs`` computes in float16."""
    found: set[int] = set()
    seen: set[tuple[Any, bool]] = set()
    waiting = [(tensor.grad_fn, False) for tensor in outputs if tensor.grad_fn is not None]
    while waiting:
        node, comes_in_half = waiting.pop()
        if (node, comes_in_half) in seen:
            continue
        seen.add((node, comes_in_half))
        is_half = _casts_from_half(node) or (comes_in_half and node.name().startswith(_VIEWS))
        for following, _ in node.next_functions:
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is None:
                waiting.append((following, is_half))
            elif is_half and isinstance(variable, nn.Parameter) and variable.dtype == torch.float32:
                found.add(id(variable))
    return found


def let_overflow(gradients: Iterable[Tensor]) -> None:
    """Make infinite, in place, what would be so in float16."""
    for gradient in gradients:
        if gradient.layout is torch.strided:
            gradient.copy_(torch.where(gradient.abs() < _TOO_LARGE, gradient, gradient * torch.inf))


def _casts_from_half(node: Any) -> bool:
    """Whether a node is the backward of a cast to float16; others that take such gradients compute in float32."""
    is_cast = node.name().startswith("ToCopyBackward")
    return is_cast and any(form.dtype == torch.float16 for form in getattr(node, "_input_metadata", ()))
