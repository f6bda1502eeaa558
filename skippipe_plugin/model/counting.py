"""A batch and its microbatches, and what of them a result may be weighted by: samples, labels that count, masks.

Pure functions of tensors. Which weighting a result follows is found out in :mod:`.reductions`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

Comparison = Literal["ne", "eq", "lt", "le", "gt", "ge", "total", "number"]
"""How an entry counts: compared with a value, by its own value (``total``), or when it is no NaN (``number``)."""
Trim = Literal["", "first", "last"]
Constant = tuple[str, float]
"""A comparison that the user's code made, and the value it compared with."""

ALWAYS: Final[tuple[Constant, ...]] = (("ne", -100), ("ne", 0), ("gt", 0))
"""What is tried whatever the code compares with: the label that torch ignores, masks, and both at once."""
_OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    name: getattr(operator, name) for name in ("ne", "eq", "lt", "le", "gt", "ge")
}
_STEP: Final = 8
_VARIED: Final = 2
_MOST_USUAL: Final = 64
"""So many combinations of sizes are remembered not to be new."""
_WATCHED_FLOATS: Final = 1 << 16
"""Larger floating tensors are taken for inputs, not for masks that may change from batch to batch."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Each microbatch weighs as many samples as it has."""

    def __str__(self) -> str:
        return "samples"


@dataclass(frozen=True, slots=True)
class Given:
    """The user's own function says what a microbatch weighs."""

    def __str__(self) -> str:
        return "microbatch_weight"


@dataclass(frozen=True, slots=True)
class Counted:
    """Each microbatch weighs as much as the entries of one of its tensors that count."""

    path: str
    """The tensor's place in the batch."""
    comparison: Comparison
    value: float = 0
    trim: Trim = ""
    """Which column is left out, as by models that predict each token from those before it."""
    rows: bool = False
    """Whether samples count that have any such entry, instead of the entries."""

    def __str__(self) -> str:
        what = {"total": "sum of", "number": "entries that are no NaN in"}.get(self.comparison)
        entries = what or f"entries {self.comparison} {self.value:g} in"
        trimmed = f" without the {self.trim} column" if self.trim else ""
        return f"{'samples with ' if self.rows else ''}{entries} {self.path}{trimmed}"


Weighting = Samples | Given | Counted


class View:
    """One batch, cut; counts are made once, when asked for.

    Args:
        batch: The whole batch.
        pieces: The microbatches.
        sizes: Their numbers of samples.
        weight: The user's own weight of a microbatch.
    """

    def __init__(
        self,
        batch: Any,
        pieces: Sequence[Any],
        sizes: Sequence[int],
        weight: Callable[[Any], float] | None = None,
    ) -> None:
        self.pieces = pieces
        self.sizes = tuple(sizes)
        self.rounding = 2e-5
        """How far, relative to their size, results may be apart that are computed in another order."""
        self.batch = batch
        self._weight = weight
        self._leaves: dict[str, Tensor] | None = None
        self._weights: dict[Weighting, tuple[float, ...] | None] = {}

    def anew(self, rounding: float) -> View:
        """Return a view of the same batch, whose values have changed, and with them how far results may be apart."""
        view = View(self.batch, self.pieces, self.sizes, self._weight)
        view.rounding = rounding
        return view

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors of the batch that have a row for each sample, by their place."""
        if self._leaves is None:
            found = dict(tensors(self.batch, "batch"))
            total = sum(self.sizes)
            self._leaves = {path: leaf for path, leaf in found.items() if leaf.ndim and leaf.shape[0] == total}
        return self._leaves

    def weights(self, weighting: Weighting) -> tuple[float, ...] | None:
        """Return what each microbatch weighs; None where nothing weighs anything, or there is no such tensor."""
        if weighting not in self._weights:
            found = self._count(weighting)
            self._weights[weighting] = found if found is not None and sum(found) > 0 else None
        return self._weights[weighting]

    def shares(self, weighting: Weighting) -> tuple[float, ...] | None:
        """Return the weights, made to sum to 1."""
        weights = self.weights(weighting)
        return None if weights is None else tuple(weight / sum(weights) for weight in weights)

    def is_plain(self, weighting: Counted) -> bool:
        """Whether every entry counts alike in this batch, so that nothing can be told from samples."""
        leaf = _trimmed(self.leaves[weighting.path], weighting.trim)
        counting = _counting(leaf, weighting)
        return bool((counting == counting.reshape(-1)[0]).all()) if counting.numel() else True

    @property
    def may_be_counted(self) -> bool:
        """Whether there are labels, or something like a mask: numbers of them may be equal by chance."""
        return any(is_discrete(leaf) or _is_like_a_mask(leaf) for leaf in self.leaves.values())

    def _count(self, weighting: Weighting) -> tuple[float, ...] | None:
        if isinstance(weighting, Samples):
            return tuple(float(size) for size in self.sizes)
        if isinstance(weighting, Given):
            assert self._weight is not None
            return tuple(float(self._weight(piece)) for piece in self.pieces)
        leaf = self.leaves.get(weighting.path)
        if leaf is None:
            return None
        counting = _counting(_trimmed(leaf, weighting.trim), weighting).reshape(leaf.shape[0], -1)
        by_sample = counting.ne(0).any(1) if weighting.rows else counting.sum(1, dtype=_wide(counting.dtype))
        return _sums(by_sample.tolist(), self.sizes)


def tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the place and the value of every tensor in ``value``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (Mapping, UserDict)):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}")


def candidates(view: View, constants: Iterable[Constant]) -> list[Counted]:
    """Return what a loss over this batch could be a mean over, besides samples."""
    known = list(dict.fromkeys([*ALWAYS, *sorted(constants)]))
    found: list[Counted] = []
    for path, leaf in view.leaves.items():
        trims: tuple[Trim, ...] = ("", "first", "last") if leaf.ndim > 1 and leaf.shape[1] > 1 else ("",)
        for comparison, value in _comparisons(leaf, known):
            for trim in trims:
                found += [Counted(path, comparison, value, trim, rows) for rows in (False, True)]
    return found


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Sizes that steps were asked with: what code does from a length on it was seen to do, or not to."""

    least: int
    most: int
    steps: frozenset[int]
    """The powers of two that divided them."""

    @classmethod
    def of(cls, size: int) -> _Lengths:
        return cls(size, size, frozenset({math.gcd(size, _STEP)}))

    def with_(self, other: _Lengths | None) -> _Lengths:
        if other is None:
            return self
        return _Lengths(min(self.least, other.least), max(self.most, other.most), self.steps | other.steps)

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most and math.gcd(size, _STEP) in self.steps


class Watch:
    """Notices that a batch holds what no batch held before that was asked about."""

    def __init__(self) -> None:
        self._values: dict[str, set[float]] = {}
        """By tensor: the landmarks that it was seen to hold."""
        self._beyond: dict[str, tuple[bool, ...]] = {}
        self.landmarks: tuple[float, ...] = ()
        """What steps compare with, in order."""
        self._plain: dict[str, int] = {}
        """By tensor that held one number only: how many batches are still asked about in which it holds several."""
        self._lengths: dict[tuple[str, int], _Lengths] = {}
        """By tensor and dimension beside the samples': the sizes it has had."""
        self._usual: set[tuple[tuple[str, torch.Size], ...]] = set()
        """Shapes of all tensors in batches since it learned, of which none is new."""
        self._looks_for_nan = False
        self._numbers: set[str] = set()
        """The tensors in which NaN was not met, by steps that look for it."""

    def learn(self, view: View, constants: Iterable[Constant]) -> None:
        """Take note of a batch that is asked about."""
        marks = {value for _, value in (*ALWAYS, *constants)}
        self.landmarks = tuple(sorted({*self.landmarks, *marks}))
        self._beyond = {path: self._between(*_range(leaf)) for path, leaf in _watched(view)} | {
            path: old for path, old in self._beyond.items() if len(old) == len(self.landmarks) + 1
        }
        for path, leaf in _watched(view):
            now = self._between(*_range(leaf))
            self._beyond[path] = tuple(a or b for a, b in zip(self._beyond[path], now, strict=True))
            held = self._values.setdefault(path, set())
            held |= {mark for mark in self.landmarks if _holds(leaf, mark)}
        for path, leaf in small(view):
            if _is_constant(leaf):
                self._plain.setdefault(path, _VARIED)
            elif path in self._plain:
                self._plain[path] -= 1
        self._usual.clear()
        for path, dim, size in _sizes(view):
            self._lengths[path, dim] = _Lengths.of(size).with_(self._lengths.get((path, dim)))
        if ("isnan", 0.0) in constants:
            free = {path for path, leaf in small(view) if leaf.is_floating_point() and not _has_nan(leaf)}
            self._numbers = (self._numbers & free) if self._looks_for_nan else free
            self._looks_for_nan = True

    def is_new(self, view: View) -> bool:
        """Whether the batch holds something new."""
        for path, leaf in _watched(view):
            low, high = _range(leaf)
            known = self._beyond.get(path)
            if known is None or any(b and not a for a, b in zip(known, self._between(low, high), strict=True)):
                return True
            unseen = [mark for mark in self.landmarks if low <= mark <= high and mark not in self._values[path]]
            if any(_holds(leaf, mark) for mark in unseen):
                return True
        if self._has_new_lengths(view):
            return True
        open_ = [path for path, left in self._plain.items() if left and path in view.leaves]
        if any(not _is_constant(view.leaves[path]) for path in open_):
            return True
        return any(path in view.leaves and _has_nan(view.leaves[path]) for path in self._numbers)

    def _has_new_lengths(self, view: View) -> bool:
        shapes = tuple([(path, leaf.shape[1:]) for path, leaf in view.leaves.items()])
        if shapes in self._usual:
            return False
        nothing = _Lengths(1, 0, frozenset())
        if any(size not in self._lengths.get((path, dim), nothing) for path, dim, size in _sizes(view)):
            return True
        if len(self._usual) < _MOST_USUAL:
            self._usual.add(shapes)
        return False

    def _between(self, low: float, high: float) -> tuple[bool, ...]:
        """By interval between landmarks: whether the smallest or the largest value lies in it."""
        edges = self.landmarks
        places = {sum(value > mark for mark in edges) for value in (low, high) if value not in edges}
        return tuple(place in places for place in range(len(edges) + 1))


def small(view: View) -> Iterator[tuple[str, Tensor]]:
    """Yield what may be labels, lengths or a mask."""
    for path, leaf in view.leaves.items():
        if 0 < leaf.numel() <= _WATCHED_FLOATS and not leaf.is_complex():
            yield path, leaf


def _sizes(view: View) -> Iterator[tuple[str, int, int]]:
    """Yield tensor, dimension and size beside the samples'."""
    for path, leaf in view.leaves.items():
        for dim, size in enumerate(leaf.shape[1:], 1):
            yield path, dim, size


def _has_nan(leaf: Tensor) -> bool:
    return bool(torch.isnan(leaf).any())


def _watched(view: View) -> list[tuple[str, Tensor]]:
    return [(path, leaf) for path, leaf in view.leaves.items() if is_discrete(leaf) and leaf.numel()]


def is_discrete(leaf: Tensor) -> bool:
    """Whether a tensor may be labels, a mask, or lengths."""
    return not (leaf.is_floating_point() or leaf.is_complex())


def _is_like_a_mask(leaf: Tensor) -> bool:
    if leaf.is_complex() or not 0 < leaf.numel() <= _WATCHED_FLOATS:
        return False
    return bool(((leaf == 0) | (leaf == 1) | torch.isnan(leaf)).any())


def _is_constant(leaf: Tensor) -> bool:
    low, high = _range(leaf.detach())
    return low == high


def _range(leaf: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(leaf.to(torch.uint8) if leaf.dtype == torch.bool else leaf)
    return low.item(), high.item()


def _holds(leaf: Tensor, mark: float) -> bool:
    return bool((leaf == mark).any())


def _comparisons(leaf: Tensor, known: Sequence[Constant]) -> list[tuple[Comparison, float]]:
    compared: list[Any] = [each for each in known if each[0] in _OPERATORS]
    compared += [("ne", value) for name, value in known if name == "eq"]
    compared += [("eq", value) for name, value in known if name == "ne" and leaf.dtype == torch.bool]
    if leaf.is_complex():
        return []
    if leaf.is_floating_point():
        compared = [each for each in compared if each not in ALWAYS]
        compared += [("number", 0)] if ("isnan", 0) in known else []
    negative = leaf.dtype != torch.bool and leaf.numel() > 0 and bool((leaf < 0).any())
    if not negative and leaf.dtype != torch.bool:
        compared.append(("total", 0))
    return list(dict.fromkeys(compared))


def _counting(leaf: Tensor, weighting: Counted) -> Tensor:
    if weighting.comparison == "total":
        return leaf.detach()
    if weighting.comparison == "number":
        return ~torch.isnan(leaf)
    counting: Tensor = _OPERATORS[weighting.comparison](leaf, weighting.value)
    return counting


def _trimmed(leaf: Tensor, trim: str) -> Tensor:
    if not trim or leaf.ndim < 2:
        return leaf
    return leaf[:, 1:] if trim == "first" else leaf[:, :-1]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.int64


def _sums(by_sample: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    sums, start = [], 0
    for size in sizes:
        sums.append(float(sum(by_sample[start : start + size])))
        start += size
    return tuple(sums)
