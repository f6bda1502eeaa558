"""Gradients that a step computes by itself (``torch.autograd.grad``, as gradient penalties do): they end at the blocks.

The graph behind the blocks begins anew, so a gradient by something before them would silently lack what goes through
them, and a backward inside of the step would count twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...engine.errors import SkipPipeError
from .graphs import goes_through, reaches

_AUTOGRAD: Final[Any] = torch.autograd  # Any: its own name for the engine is private


class Checked:
    """Refuse such gradients while user code runs with what the blocks have returned.

    Args:
        calls: By call of the blocks: their result, and what they were given.
    """

    __slots__ = ("_calls", "_original")

    def __init__(self, *calls: tuple[Tensor, Sequence[Tensor]]) -> None:
        self._calls = calls
        self._original: Any = None  # Any: torch's own

    def __enter__(self) -> None:
        self._original = _AUTOGRAD._engine_run_backward  # what both grad() and backward() call
        _AUTOGRAD._engine_run_backward = self._run_backward

    def __exit__(self, *_: object) -> None:
        _AUTOGRAD._engine_run_backward = self._original

    def _run_backward(self, outputs: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:  # Any: torch's own
        for result, sources in self._calls:
            if goes_through(outputs, result):
                _check(args[3] if len(args) > 3 else (), kwargs.get("accumulate_grad", False), sources)
        return self._original(outputs, *args, **kwargs)


def _check(
    inputs: Sequence[Any], accumulates: bool, sources: Sequence[Tensor]
) -> None:  # Any: tensors or edges of the graph
    if accumulates:
        raise SkipPipeError(
            "backward() was called inside of the step on something that depends on the blocks of the pipeline; under "
            "automatic optimization return the loss instead, with such a term added to it"
        )
    if any(isinstance(each, Tensor) and reaches(source, each) for each in inputs for source in sources):
        raise SkipPipeError(
            "torch.autograd.grad() asks inside of the step for the gradient of something behind the blocks of the "
            "pipeline by something before them (a gradient penalty, a physics-informed loss), but the graph ends at "
            "the blocks, which are on workers. Name a stack that is not in between with blocks=..., or train without "
            "the pipeline"
        )
