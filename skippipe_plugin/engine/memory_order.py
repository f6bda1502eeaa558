"""In which order a tensor's dimensions lie in memory: those of a transpose, or of what is channels last, in another.

It is a part of a tensor's form: what is made like a tensor (``randn_like``, dropout), ``view`` and ``is_contiguous``
depend on it. Gaps and repeats are not kept: what has them lies as torch lays what is made like it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Order = tuple[int, ...]
"""The dimensions as they lie in memory, the outermost first; empty: in their own order."""


def order_of(tensor: Tensor) -> Order:
    """Return the order of a tensor's dimensions in memory.

    >>> order_of(torch.zeros(2, 3, 4)), order_of(torch.zeros(2, 3, 4).transpose(1, 2))
    ((), (0, 2, 1))
    >>> order_of(torch.zeros(2, 1, 4, 4).to(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    """
    if tensor.layout is not torch.strided:
        return ()
    shape = tensor.shape
    if not tensor.is_contiguous():
        strides = torch.empty_like(tensor, device="meta").stride()
    elif 1 in shape:  # then its own order is not the only one that counts as contiguous
        strides = tensor.stride()
    else:
        return ()
    order = tuple(sorted(range(len(shape)), key=lambda dim: (-strides[dim], shape[dim] == 1)))
    return () if order == tuple(range(len(order))) else order


def laid(tensor: Tensor, order: Order) -> Tensor:
    """Return the same values in that order in memory, without a copy where they lie so."""
    if not order:
        return tensor.contiguous()
    return from_memory(in_memory(tensor, order).contiguous(), order)


def in_memory(tensor: Tensor, order: Order) -> Tensor:
    """View a tensor with its dimensions in that order: it is contiguous where it lies so."""
    return tensor.permute(order) if order else tensor


def from_memory(tensor: Tensor, order: Order) -> Tensor:
    """Invert :func:`in_memory`."""
    return tensor.permute(sorted(range(len(order)), key=order.__getitem__)) if order else tensor


def joined(pieces: Sequence[Tensor], dim: int, order: Order | None = None) -> Tensor:
    """Concatenate in the first piece's order in memory, or in a given one; torch keeps few of them."""
    order = order_of(pieces[0]) if order is None else order
    if not order:
        return torch.cat(list(pieces), dim).contiguous()
    return from_memory(torch.cat([in_memory(each, order) for each in pieces], order.index(dim)).contiguous(), order)
