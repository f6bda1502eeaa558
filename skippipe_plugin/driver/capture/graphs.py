"""The driver's graph around the blocks: what comes before them, what comes after, and what goes past them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_Node = Any
"""A node of autograd's graph: torch's own stubs do not agree on its type."""


def goes_past(outputs: Iterable[Tensor], hidden: Tensor) -> bool:
    """Whether ``outputs`` depend on what ``hidden`` was computed from other than through the blocks.

    Then the graph before the blocks takes two backwards: one from the outputs, one from the blocks.
    """
    if hidden.grad_fn is None:
        return False
    before = set(_nodes([hidden]))
    return any(node in before for node in _nodes(outputs))


def _nodes(tensors: Iterable[Tensor]) -> Iterator[_Node]:
    """Yield the nodes that the backward of ``tensors`` runs, but for those that only add up a leaf's gradient."""
    found: set[_Node] = set()
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in found or not node.next_functions:
            continue
        found.add(node)
        yield node
        waiting += [each for each, _ in node.next_functions if each is not None]


class _HandedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def handed_out(leaf: Tensor) -> Tensor:
    """Return a leaf's values such that they may be changed in place, as those of any tensor that was computed."""
    if not leaf.requires_grad:
        return leaf
    with torch.enable_grad():
        return _HandedOut.apply(leaf)  # type: ignore[no-untyped-call, no-any-return]
