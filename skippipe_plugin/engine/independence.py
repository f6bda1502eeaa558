"""Whether a block computes the same for a part of a batch as for all of it: what makes microbatches exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .call import Call


@dataclass(frozen=True, slots=True)
class Parts:
    """How a call of one block is cut, for the question whether that changes what the block computes."""

    calls: tuple[Call, ...]
    """The calls with the parts' side inputs."""
    rows: tuple[int, ...]
    """By part: how many rows it has in dimension :attr:`enters` of what enters the block."""
    enters: int
    leaves: int
    """The dimension of the block's result in which the parts' results are put together."""


def is_independent(
    module: nn.Module, run: Callable[[Call, Tensor], Tensor], call: Call, hidden: Tensor, parts: Parts
) -> bool:
    """Compare what ``run`` makes of ``hidden`` with what it makes of its parts.

    A block that draws random numbers is compared without them: in evaluation mode, but for BatchNorm.
    """
    torch.manual_seed(0)
    whole = run(call, hidden)
    torch.manual_seed(1)
    if torch.equal(whole, run(call, hidden)) or not module.training:
        return _is_same(run, whole, hidden, parts)
    with _not_drawing(module):
        return _is_same(run, run(call, hidden), hidden, parts)


def _is_same(run: Callable[[Call, Tensor], Tensor], whole: Tensor, hidden: Tensor, parts: Parts) -> bool:
    pieces = torch.split(hidden, list(parts.rows), parts.enters)
    try:
        results = [run(call, piece) for call, piece in zip(parts.calls, pieces, strict=True)]
        together = torch.cat(results, parts.leaves)
    except Exception:  # the block refuses a part, whatever it says of it
        return False
    tolerance = 1e-4 if whole.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu") else 3e-2
    scale = float(whole.detach().abs().nan_to_num(posinf=0.0).max()) if whole.numel() else 0.0
    return together.shape == whole.shape and torch.allclose(
        together, whole, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


@contextmanager
def _not_drawing(module: nn.Module) -> Iterator[None]:
    modes = [(each, each.training) for each in module.modules()]
    for each, _ in modes:
        each.training = each.training and isinstance(each, _BatchNorm)
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
