"""Comparisons that came out alike for all samples of a batch: what if one of them comes out the other way?

What a step selects, or does once there is any sample of a kind, does not show in a batch in which no sample is, or all
are. So when a step is asked such a comparison is turned for one sample, in its microbatch as in the batch. And where
some sample of every microbatch is of a kind, one microbatch is to have none, while the batch has still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from .counting import View
from .kinks import caller

WHY: Final = (
    "when a comparison or a lookup ({name}) comes out otherwise for a part of the batch, its results are no longer "
    "those that follow from microbatches'"
)
COMPARISONS: Final = frozenset({"ne", "eq", "lt", "le", "gt", "ge"})
LOOKUPS: Final = frozenset({"getitem", "index_select", "gather", "take"})
"""What finds a number for each sample in a table, as the weight of its class; counts like a comparison."""
REDUCTIONS: Final = frozenset({"any", "all"})
_OPEN: Final = {"any": True, "all": False}
"""What they say of a batch when they may say the opposite of one of its microbatches."""
_MOST: Final = 6
"""So many comparisons of a step are turned."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison that a step has made."""

    name: str
    outcome: Tensor
    operands: tuple[Tensor, ...]
    of_values: bool = False
    """Whether it follows from comparisons of hidden states or features."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A comparison that is turned for the first sample."""

    number: int
    """How many others the step makes before."""
    dim: int | None
    """Where samples are; None for what is said of all of a microbatch, and turned there alone."""
    name: str

    def of(self, outcome: Tensor) -> Tensor:
        """Return an outcome, turned."""
        if self.dim is None:
            return ~outcome
        turned = outcome.clone()
        if turned.numel():
            first = turned.narrow(self.dim, 0, 1)
            if turned.dtype == torch.bool:
                first.fill_(not first.reshape(-1)[0].item())
            else:
                first.add_(1.0)
        return turned


class Comparisons:
    """The comparisons that one run of a step makes.

    Args:
        flip: The one that is turned.
    """

    def __init__(self, flip: Flip | None = None) -> None:
        self.seen: list[Compared] = []
        self._flip = flip

    def follow(self, name: str, args: Sequence[Any], result: Any, *, of_values: bool = False) -> Any:
        """Note a comparison or a lookup, and return how it is to come out."""
        if not isinstance(result, Tensor) or bool(result.ndim) == (name in REDUCTIONS):
            return result
        if not (_is_found(args) if name in LOOKUPS else result.dtype == torch.bool) or caller()[1]:
            return result
        flip = self._flip
        if flip is not None and flip.number == len(self.seen) and (flip.dim is None or flip.dim < result.ndim):
            result = flip.of(result)
        self.seen.append(Compared(name, result, tuple(each for each in args if isinstance(each, Tensor)), of_values))
        return result


def flips(whole: Sequence[Compared], parts: Sequence[Sequence[Compared]], view: View) -> tuple[Flip, ...]:
    """Return the comparisons that told the batch's samples apart no better than those of microbatches.

    Those of a label or a mask as it stands in the batch are looked at in each batch (:class:`.counting.Watch`).
    """
    if any([each.name for each in part] != [each.name for each in whole] for part in parts):
        return ()
    found: list[Flip] = []
    for number, (one, *others) in enumerate(zip(whole, *parts, strict=True)):
        if one.name in REDUCTIONS:
            if one.of_values and all(bool(each.outcome) == _OPEN[one.name] for each in (one, *others)):
                found.append(Flip(number, None, one.name))
            continue
        dim = _dim_of_samples(one.outcome, others[0].outcome)
        is_watched = one.name not in LOOKUPS and _is_watched(one, others[0], view)
        if dim is not None and _is_even(one, others) and not is_watched:
            found.append(Flip(number, dim, one.name))
    return tuple(found[:_MOST])


def _is_found(args: Sequence[Any]) -> bool:
    """Whether a lookup is one of integers in a table of numbers that is not trained."""
    table, *rest = args
    if not isinstance(table, Tensor) or table.ndim != 1 or not table.is_floating_point() or table.requires_grad:
        return False
    return any(isinstance(each, Tensor) and each.ndim and each.dtype in (torch.int64, torch.int32) for each in rest)


def _dim_of_samples(whole: Tensor, part: Tensor) -> int | None:
    if whole.ndim != part.ndim:
        return None
    dims = [dim for dim, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b]
    return dims[0] if len(dims) == 1 else None


def _is_even(whole: Compared, parts: Sequence[Compared]) -> bool:
    shares = [float(each.outcome.float().mean()) for each in (whole, *parts) if each.outcome.numel()]
    return bool(shares) and max(shares) - min(shares) < 1e-6


def _is_watched(whole: Compared, part: Compared, view: View) -> bool:
    own = [a for a, b in zip(whole.operands, part.operands, strict=False) if a.shape != b.shape]
    with torch.no_grad():
        return all(any(_is_same(operand, leaf) for leaf in _watched(view)) for operand in own)


def _watched(view: View) -> Iterator[Tensor]:
    for leaf in view.leaves.values():
        if (
            not leaf.is_complex()
            and leaf.numel()
            and (not leaf.is_floating_point() or bool((leaf == leaf.min()).all()))
        ):
            yield leaf
            if leaf.ndim > 1 and leaf.shape[1] > 1:
                yield leaf[:, 1:]
                yield leaf[:, :-1]


def _is_same(operand: Tensor, leaf: Tensor) -> bool:
    if operand.numel() != leaf.numel() or operand.is_complex():
        return False
    return torch.equal(operand.reshape(-1).double(), leaf.reshape(-1).to(operand.device).double())
