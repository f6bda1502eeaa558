"""Steps that may do something else where values are of other sizes: they look at numbers that have left torch.

What becomes of ``float(x.max())`` or of an array nobody can follow. So when a step is asked that takes such numbers,
its features and hidden states are made much smaller, and much larger, and its results are to follow as before.
And where it takes a course by what it has looked at, the features and hidden states of one microbatch alone are
made small, and its features all of one sign.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .counting import View, tensors

FACTORS: Final = (1 / 64, 1 / 4, 32.0)
"""What is added to values, as by a bias, hides those that are much smaller."""
ROUNDING: Final = 5e-3
"""How far results may be off: small differences of values that have become smaller are of few digits."""
WHY: Final = (
    "it looks at single values ({name}), and when all values are of another size, its results are no longer those that "
    "follow from microbatches'"
)
WHY_APART: Final = (
    "when all values of one microbatch are small or of one sign, its results are no longer those that follow from "
    "microbatches'"
)
_LEAVES_TORCH: Final = frozenset({"item", "float", "int", "index", "bool", "complex", "tolist", "numpy", "array"})
_LOOKS: Final = frozenset(
    ("bool", "item", "tolist", "numpy", "array", "int", "float", "index", "len", "equal", "allclose")
)
_SELECTS: Final = frozenset({"nonzero", "argwhere", "where", "masked_select", "getitem"})
_INDICES: Final = frozenset({"long", "int", "short", "to", "type", "type_as"})


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one run of a step has done that may depend on the size of values."""

    suspect: str = ""
    """The function that makes it likely; nothing where there is none."""
    has_indices: bool = False
    """Whether values may have become indices, which must not be larger."""

    @classmethod
    def of(cls, name: str, *, is_floor: bool) -> Sizes:
        """Return what a function, given features or hidden states, has done."""
        return cls(name if is_floor or name in _LEAVES_TORCH else "", name in _INDICES)

    def __or__(self, other: Sizes) -> Sizes:
        return Sizes(self.suspect or other.suspect, self.has_indices or other.has_indices)


def resize(view: View, features: Collection[int], factor: float) -> None:
    """Multiply a batch's features, and its microbatches'.

    Args:
        view: Holds them.
        features: The ids of their tensors.
        factor: By how much.
    """
    leaves = [leaf for part in (view.batch, *view.pieces) for _, leaf in tensors(part, "batch") if id(leaf) in features]
    with torch.no_grad():
        values = [leaf * factor for leaf in leaves]  # before any is written: microbatches may be views of the batch
        for leaf, value in zip(leaves, values, strict=True):
            if 0 not in leaf.stride():
                leaf.copy_(value)


def takes_course(name: str, args: Collection[object], result: object) -> bool:
    """Whether a step may do something else by what a function returns: a number, or as many values as there are."""
    if name in _LOOKS:
        return not isinstance(result, Tensor)
    if name == "where":
        return len(args) == 1
    if name == "getitem":
        return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args)
    return name in _SELECTS


@dataclass(frozen=True, slots=True)
class Apart:
    """How one microbatch is made unlike the others."""

    change: Callable[[Tensor], Tensor]
    is_of_sign: bool = True
    """Whether only features that have both signs may become so."""
    hidden: float = 1.0
    """By how much its hidden states are multiplied."""

    def applies(self, feature: Tensor) -> bool:
        """Whether a microbatch may hold such features."""
        return not self.is_of_sign or bool((feature > 0).any() and (feature < 0).any())

    def write(self, view: View, features: Collection[int]) -> bool:
        """Change the features of the first microbatch, and of its samples in the batch; whether there were any."""
        of_batch = dict(tensors(view.batch, "batch"))
        written: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for path, leaf in tensors(view.pieces[0], "batch"):
                whole = of_batch.get(path)
                if id(leaf) in features and whole is not None and self.applies(leaf):
                    changed = self.change(leaf)
                    written += [(leaf, changed), (whole[: view.sizes[0]], changed)]
            for leaf, changed in written:
                if 0 not in leaf.stride() and leaf.shape == changed.shape:
                    leaf.copy_(changed)
        return bool(written)


APART: Final = Apart(lambda x: x / 64, is_of_sign=False, hidden=1 / 64), Apart(lambda x: -x.abs()), Apart(torch.abs)
