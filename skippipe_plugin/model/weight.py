"""What microbatches weigh by the user's word: ``microbatch_weight=...``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..engine.errors import SkipPipeError
from .counting import View

MicrobatchWeight = Callable[[Any], float] | Literal["samples", "sum"]
"""A function of a microbatch, whose share of the batch's loss is its weight over all weights; ``"samples"``: its number
of samples; ``"sum"``: the losses of microbatches add up."""


def view_of(batch: Any, pieces: Sequence[Any], sizes: Sequence[int], weight: MicrobatchWeight | None) -> View:
    """Return a cut batch, whose microbatches weigh what the user says if he does."""
    return View(batch, pieces, sizes, _checked(weight) if callable(weight) else None)


def _checked(weight: Callable[[Any], float]) -> Callable[[Any], float]:
    def checked(piece: Any) -> float:
        value = float(weight(piece))
        if not 0 <= value < float("inf"):
            raise SkipPipeError(f"microbatch_weight returned {value}; return a number that is not negative")
        return value

    return checked
