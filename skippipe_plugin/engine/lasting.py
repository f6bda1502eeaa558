"""Whether what a forward of a block leaves shows in what comes after it: of replicas each has a part of that only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .attributes import attributes_kept
from .device_errors import is_of_device
from .kept_state import Buffers
from .transport import TensorSpec

_TOLERANCE = 1e-5
Run = Callable[[Tensor], Sequence[Tensor]]
"""Calls the block with hidden states."""


def shows_later(module: nn.Module, buffers: Buffers, run: Run, enters: TensorSpec, device: torch.device) -> bool:
    """Compare what the next forwards of a block make that has run once with what they make of one that has not.

    Args:
        module: The block; it is afterwards what it was before.
        buffers: Its buffers.
        run: Calls it.
        enters: What enters it.
        device: Where.
    """
    earlier, hidden = (enters.random(device) for _ in range(2))
    buffers.restore()
    outcomes = []
    for has_run in (False, True):
        with attributes_kept(module):
            if has_run:
                torch.manual_seed(0)
                run(earlier)
            outcomes.append(next_outcomes(module, functools.partial(run, hidden)))
        buffers.restore()
    return not all(map(_are_same, *outcomes))


def next_outcomes(module: nn.Module, run: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Return what evaluation, and then the next forward, make of what a block has kept; nothing where they fail."""
    return [_outcome(run, mode) for mode in (in_training(module, lambda _: False), nullcontext())]


@contextmanager
def in_training(module: nn.Module, who: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Let these parts of a module, and no others, be in training."""
    modes = [(each, each.training) for each in module.modules()]
    for each, _ in modes:
        each.training = who(each)
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def _outcome(run: Callable[[], Sequence[Tensor]], mode: AbstractContextManager[None]) -> Sequence[Tensor]:
    torch.manual_seed(0)
    try:
        with mode:
            return run()
    except Exception as error:
        if is_of_device(error):
            raise
        return ()


def _are_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(_is_same, one, other))


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=0.0, equal_nan=True)
