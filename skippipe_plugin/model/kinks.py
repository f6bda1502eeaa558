"""Where a step bends: functions that go one way or another by a value that all samples of the batch make together.

Made-up hidden states may lie on one side of such a place by luck, in the batch and in all of its microbatches; those of
later steps need not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

Kink = tuple[str, tuple[int, ...]]
"""The name of a function, and the shape of what it was taken of."""
COURSE: Final = "the outcome"
WHY: Final = "{name} of a value that all samples make together goes one way or another, for a microbatch by its own"
_MARK: Final = "_skippipe_made_up"
_COMPARISONS: Final = frozenset({"lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"})
_BENT: Final = _COMPARISONS | frozenset(
    (
        *("abs", "absolute", "max", "min", "maximum", "minimum", "fmax", "fmin", "amax", "amin", "median", "quantile"),
        *("clamp", "clip", "clamp_min", "clamp_max", "sign", "sgn", "round", "floor", "ceil", "trunc", "fix", "frac"),
        *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "hardtanh", "hardsigmoid", "hardswish", "threshold"),
        *("hardshrink", "softshrink", "heaviside", "elu", "celu", "selu", "sort", "topk", "kthvalue"),
        *("l1_loss", "smooth_l1_loss", "huber_loss", "margin_ranking_loss", "hinge_embedding_loss"),
    )
)


def mark(value: Any) -> None:
    """Note that a tensor follows from made-up hidden states."""
    if isinstance(value, Tensor) and value.is_floating_point():
        value.__dict__[_MARK] = True


class Kinks:
    """What one run of a step has bent."""

    def __init__(self) -> None:
        self.seen: list[Kink] = []

    def follow(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Note what a function of torch was called with, mark what it returns, and return that."""
        marked = [each for each in _tensors((*args, *kwargs.values())) if _MARK in each.__dict__]
        if not marked:
            return result
        name = getattr(func, "__name__", "").strip("_")
        if name in _BENT:
            self.note(name, marked[0].shape)
        if name == "item" and type(result) is float:
            return Watched(result, self.note)
        if name == "setitem":
            mark(args[0])
        if name == "iter":
            result = list(result)
        for each in _tensors((result,)):
            mark(each)
        return iter(result) if name == "iter" else result

    def note(self, name: str, shape: Sequence[int] = ()) -> None:
        """Note that a function that bends was taken of something made up."""
        self.seen.append((name, tuple(shape)))


class Watched(float):
    """A number that says with whom it is compared."""

    _note: Callable[[str], None]

    def __new__(cls, value: float, note: Callable[[str], None]) -> Watched:
        """Make one of an ordinary number."""
        self = super().__new__(cls, value)
        self._note = note
        return self

    def __lt__(self, other: Any) -> Any:
        """Compare."""
        self._note("lt")
        return float.__lt__(self, other)

    def __le__(self, other: Any) -> Any:
        """Compare."""
        self._note("le")
        return float.__le__(self, other)

    def __gt__(self, other: Any) -> Any:
        """Compare."""
        self._note("gt")
        return float.__gt__(self, other)

    def __ge__(self, other: Any) -> Any:
        """Compare."""
        self._note("ge")
        return float.__ge__(self, other)

    __hash__ = float.__hash__

    def __reduce__(self) -> Any:
        """Travel as an ordinary number."""
        return float, (float(self),)


def bent(whole: Sequence[Kink], parts: Sequence[Sequence[Kink]]) -> str:
    """Name a function that bends by what all samples make together; nothing where there is none.

    What belongs to samples is of another shape for the batch than for its microbatches, or comes more often.
    """
    if any(len(part) != len(whole) for part in parts):
        whole, parts = _of_numbers(whole), [_of_numbers(part) for part in parts]
    if any(len(part) != len(whole) for part in parts):
        return ""
    for number, kink in enumerate(whole):
        if 0 not in kink[1] and all(part[number] == kink for part in parts):
            return f"a comparison ({kink[0]})" if kink[0] in _COMPARISONS else kink[0]
    return ""


def _of_numbers(kinks: Sequence[Kink]) -> list[Kink]:
    return [kink for kink in kinks if not kink[1]]


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(tuple(value.values()))
