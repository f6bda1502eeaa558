"""Gradients that a step computes by itself (``torch.autograd.grad``, as gradient penalties do): they end at the blocks.

The graph behind the blocks begins anew, so a gradient by something before them would silently lack what goes through
them, and a backward inside of the step would count twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import SkipPipeError
from .graphs import goes_through, reaches


@contextmanager
def checked(result: Tensor, hidden: Tensor) -> Iterator[None]:
    """Refuse such gradients while user code runs with the blocks' ``result``; ``hidden`` is what entered them."""
    autograd: Any = torch.autograd  # Any: its own name for the engine is private
    original = autograd._engine_run_backward  # what both grad() and backward() call

    def run_backward(outputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:  # Any: torch's own
        if goes_through(outputs, result):
            _check(args[3] if len(args) > 3 else (), kwargs.get("accumulate_grad", False), hidden)
        return original(outputs, *args, **kwargs)

    autograd._engine_run_backward = run_backward
    try:
        yield
    finally:
        autograd._engine_run_backward = original


def _check(inputs: Sequence[Any], accumulates: bool, hidden: Tensor) -> None:  # Any: tensors or edges of the graph
    if accumulates:
        raise SkipPipeError(
            "backward() was called inside of the step on something that depends on the blocks of the pipeline; under "
            "automatic optimization return the loss instead, with such a term added to it"
        )
    if any(isinstance(each, Tensor) and reaches(hidden, each) for each in inputs):
        raise SkipPipeError(
            "torch.autograd.grad() asks inside of the step for the gradient of something behind the blocks of the "
            "pipeline by something before them (a gradient penalty, a physics-informed loss), but the graph ends at "
            "the blocks, which are on workers. Name a stack that is not in between with blocks=..., or train without "
            "the pipeline"
        )
