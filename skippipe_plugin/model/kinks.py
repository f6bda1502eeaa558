"""Where a step bends: functions that go one way or another by a value that all samples of the batch make together.

Made-up hidden states may lie on one side of such a place by luck, in the batch and in all of its microbatches; those of
later steps need not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor

from .resized import Sizes

Kink = tuple[str, tuple[int, ...]]
"""The name of a function, and the shape of what it was taken of."""
COURSE: Final = "the outcome"
WHY: Final = "{name} of a value that all samples make together goes one way or another, for a microbatch by its own"
_MARK: Final = "_skippipe_made_up"
_COMPARED: Final = "_skippipe_compared"
"""Marks what tells by a comparison of values that were made up, or of features."""
_IS_SHARE: Final = "_skippipe_share"
"""Marks what lies between 0 and 1 whatever the values."""
_SHARES: Final = frozenset({"sigmoid", "softmax"})
_PLACES: Final = frozenset(
    {"getitem", "squeeze", "unsqueeze", "flatten", "reshape", "view", "detach", "float", "select"}
)
"""What keeps the values."""
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


_ANY: Final = frozenset({"any", "all"})
_COUNTING: Final = frozenset({"unique", "unique_consecutive"}) | _ANY
"""What bends by how often samples hold the same, or whether one of them does: never among few of them, perhaps."""
_BETWEEN: Final = frozenset({"torch", __name__.partition(".")[0]})
"""Whose functions call others for the step."""


def mark(value: Any, *, made_up: bool = True) -> None:
    """Note that a tensor follows from made-up hidden states, or else from the batch's features alone."""
    if isinstance(value, Tensor) and value.is_floating_point():
        value.__dict__[_MARK] = made_up


def is_compared(value: Any) -> bool:
    """Whether a tensor tells by comparisons of values that were made up, or of features."""
    return isinstance(value, Tensor) and _COMPARED in value.__dict__


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
        if given and name in _COUNTING and _counts(name, given[0]):
            self.note(name, given[0].shape)
        if given:
            _mark_kind(name, given, result, is_marked=bool(marked))
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
    counted = [kink for kink in whole if kink[0] in _COUNTING]
    if counted and any([kink for kink in part if kink[0] in _COUNTING] != counted for part in parts):
        return counted[0][0]
    whole, parts = _uncounted(whole), [_uncounted(part) for part in parts]
    if any(len(part) != len(whole) for part in parts):
        whole, parts = _of_numbers(whole), [_of_numbers(part) for part in parts]
    if any(len(part) != len(whole) for part in parts):
        return ""
    for number, kink in enumerate(whole):
        others = [part[number] for part in parts]
        if 0 not in kink[1] and all(other == kink for other in others):
            return f"a comparison ({kink[0]})" if kink[0] in _COMPARISONS else kink[0]
    return ""


def _mark_kind(name: str, given: Sequence[Tensor], result: Any, *, is_marked: bool) -> None:
    """Note of a result whether it is a share, and whether a comparison of what may be any number has made it."""
    if not isinstance(result, Tensor):
        return
    is_kept = name in _PLACES or (name == "get" and result.data_ptr() == given[0].data_ptr())  # a property, as Tensor.T
    if name in _SHARES or (is_kept and _IS_SHARE in given[0].__dict__):
        result.__dict__[_IS_SHARE] = True
    is_open = is_marked and name in _COMPARISONS and _IS_SHARE not in given[0].__dict__
    if result.dtype == torch.bool and (is_open or any(map(is_compared, given))):
        result.__dict__[_COMPARED] = True


def _counts(name: str, given: Tensor) -> bool:
    """Whether it matters to a step what such a function says: metrics are not asked what else would become of them."""
    name_of_caller, is_metric = caller()
    if is_metric and name_of_caller.endswith("_validation"):  # what makes no sense is refused
        return False
    return name not in _ANY or (is_metric and is_compared(given))


def caller() -> tuple[str, bool]:
    """Return the name of the function that called one of torch, and whether it is a metric's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    if frame is None:
        return "", False
    return frame.f_code.co_name, frame.f_globals.get("__name__", "").partition(".")[0] == "torchmetrics"


def _is_floor(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function keeps a sum of weights from being nothing."""
    if name not in ("clamp", "clip", "clamp_min"):
        return False
    low, high = (*args[1:], None, None)[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return high is None and isinstance(low, (int, float)) and 0 < low <= 1


def _uncounted(kinks: Sequence[Kink]) -> list[Kink]:
    return [kink for kink in kinks if kink[0] not in _COUNTING]


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
