"""A gradient that is none, on its way between ranks: nothing behind it depended on what it is the gradient of.

In one process such parameters keep ``grad=None``, and optimizers leave them alone; zeros would decay them and move
their averages. The receiver has posted a receive of a known size, so what says "none" is a tensor of that size: all
of its bits are set, a NaN that no arithmetic makes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .transport import TensorSpec


def absent(spec: TensorSpec, device: torch.device) -> Tensor:
    """Return what travels in the place of no gradient.

    >>> is_absent(absent(TensorSpec((2, 3), torch.float32), torch.device("cpu")))
    True
    >>> is_absent(torch.full((2, 3), float("nan")))
    False
    """
    tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8).fill_(255)
    return tensor


def is_absent(tensor: Tensor) -> bool:
    """Whether a tensor that came stands for none."""
    if not tensor.numel():
        return False
    # This is asked of every gradient that comes, and torch takes ten times as long to read one element.
    if tensor.is_cpu and ctypes.c_ubyte.from_address(tensor.data_ptr()).value != 255:
        return False
    return bool((tensor.reshape(-1).contiguous().view(torch.uint8) == 255).all())
