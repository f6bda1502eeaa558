"""Where a step bends: functions that go one way or another by a value that all samples of the batch make together.

Made-up hidden states may lie on one side of such a place by luck, in the batch and in all of its microbatches; those of
later steps need not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from .resized import Sizes

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


_COUNTING: Final = frozenset({"unique", "unique_consecutive"})
"""What bends by how often samples hold the same: never among few of them, perhaps."""


def mark(value: Any, *, made_up: bool = True) -> None:
    """Note that a tensor follows from made-up hidden states, or else from the batch's features alone."""
    if isinstance(value, Tensor) and value.is_floating_point():
        value.__dict__[_MARK] = made_up


def features(leaves: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors of a batch that hold features: floating ones, but for masks and what is one number."""
    for leaf in leaves:
        if (
            leaf.is_floating_point()
            and leaf.numel()
            and not bool(((leaf == 0) | (leaf == 1) | (leaf == leaf.max())).all())
        ):
            yield leaf


class Kinks:
    """What one run of a step has bent.

    Args:
        features: The ids of tensors of the batch.
    """

    def __init__(self, features: Collection[int] = ()) -> None:
        self.seen: list[Kink] = []
        self.sizes = Sizes()
        """What may bend where values are of other sizes."""
        self._features = features

    def follow(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Any:
        """Note what a function of torch was called with, mark what it returns, and return that."""
        name = getattr(func, "__name__", "").strip("_")
        given = list(_tensors((*args, *kwargs.values())))
        marked = [each for each in given if _MARK in each.__dict__ or id(each) in self._features]
        if name in _COUNTING and given:
            self.note(name, given[0].shape)
        if not marked:
            return result
        made_up = any(each.__dict__.get(_MARK) for each in marked)
        is_floor = not made_up and _is_floor(name, args, kwargs)
        if name in _BENT and not is_floor:
            self.note(name, marked[0].shape)
        self.sizes |= Sizes.of(name, is_floor=is_floor)
        if name == "item" and type(result) is float:
            return Watched(result, self.note)
        if name == "setitem":
            mark(args[0], made_up=made_up)
        if name == "iter":
            result = list(result)
        for each in _tensors((result,)):
            mark(each, made_up=made_up)
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
        others = [part[number] for part in parts]
        if kink[0] in _COUNTING and any(other != kink for other in others):
            return kink[0]
        if kink[0] not in _COUNTING and 0 not in kink[1] and all(other == kink for other in others):
            return f"a comparison ({kink[0]})" if kink[0] in _COMPARISONS else kink[0]
    return ""


def _is_floor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function keeps a sum of weights from being nothing."""
    if name not in ("clamp", "clip", "clamp_min"):
        return False
    low, high = (*args[1:], None, None)[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return high is None and isinstance(low, (int, float)) and 0 < low <= 1


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
