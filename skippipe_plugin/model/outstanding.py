"""Microbatches that stand out: all or none of their entries are what only some of the batch's are.

Steps often do something else then: no mask is made when nothing is padded, for a microbatch where the batch has one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeVar

import torch
from torch import Tensor

from .counting import ALWAYS, View, is_discrete, small

_MOST_MARKS: Final = 8
"""If a step compares with more numbers, these are classes and not what stands for padding."""
Pattern = tuple[float | str, str]
"""A number, and how many of a microbatch's entries are that; or where in the batch's range those lie that are alike."""

_N = TypeVar("_N", int, float)


class Outstanding:
    """Knows how microbatches stood out in batches that were asked about."""

    def __init__(self) -> None:
        self._seen: dict[str, set[Pattern]] = {}
        """By tensor that is looked at."""
        self._marks: tuple[float, ...] = ()

    def learn(self, view: View, marks: Sequence[float]) -> None:
        """Take note of a batch; ``marks`` are numbers that the step compares with."""
        self._marks = tuple(marks)
        masks = {path for path, leaf in small(view) if leaf.is_floating_point() and _has_two_values(leaf)}
        for path, leaf in view.leaves.items():
            if leaf.numel() and (path in masks or is_discrete(leaf)):
                self._seen.setdefault(path, set()).update(self._patterns(leaf, view.sizes))

    def is_new(self, view: View) -> bool:
        """Whether a microbatch stands out as none did."""
        leaves = view.leaves
        return any(
            path in leaves and leaves[path].numel() and not known.issuperset(self._patterns(leaves[path], view.sizes))
            for path, known in self._seen.items()
        )

    def _patterns(self, leaf: Tensor, sizes: Sequence[int]) -> set[Pattern]:
        if len(sizes) < 2:
            return set()
        rows = leaf.detach().reshape(leaf.shape[0], -1)
        rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
        smallest, largest = torch.stack([rows.amin(1), rows.amax(1)]).tolist()
        low, high = min(smallest), max(largest)
        if low == high:
            return set()
        found = set[Pattern]()
        for least, most in zip(_split(smallest, sizes), _split(largest, sizes), strict=True):
            if min(least) == max(most):
                found.add(("alike", {low: "low", high: "high"}.get(max(most), "between")))
        marks = [mark for mark in self._marks_for(leaf) if low <= mark <= high]
        if marks:
            counts = torch.stack([(rows == mark).sum(1) for mark in marks]).tolist()
            found.update(_of_counts(marks, counts, sizes, rows.shape[1]))
        return found

    def _marks_for(self, leaf: Tensor) -> Iterable[float]:
        if leaf.is_floating_point():
            return ()
        usual = {value for _, value in ALWAYS}
        return self._marks if leaf.ndim > 1 and len(self._marks) <= _MOST_MARKS else usual.intersection(self._marks)


def _of_counts(
    marks: Sequence[float], counts: Sequence[Sequence[int]], sizes: Sequence[int], columns: int
) -> Iterator[Pattern]:
    for mark, by_row in zip(marks, counts, strict=True):
        if not 0 < sum(by_row) < sum(sizes) * columns:
            continue
        for rows in _split(by_row, sizes):
            yield mark, {0: "none", len(rows) * columns: "all"}.get(sum(rows), "some")


def _split(values: Sequence[_N], sizes: Sequence[int]) -> Iterator[Sequence[_N]]:
    ends = list(itertools.accumulate(sizes))
    return (values[end - size : end] for end, size in zip(ends, sizes, strict=True))


def _has_two_values(leaf: Tensor) -> bool:
    """Whether a floating tensor may be a mask."""
    low, high = torch.aminmax(leaf.detach())
    return bool(((leaf == low) | (leaf == high)).all())
