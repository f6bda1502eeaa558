"""Steps that may do something else where values are of other sizes: they look at numbers that have left torch.

What becomes of ``float(x.max())`` or of an array nobody can follow. So when a step is asked that takes such numbers,
its features and hidden states are made much smaller, and much larger, and its results are to follow as before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import torch

from .counting import View, tensors

FACTORS: Final = (1 / 64, 1 / 4, 32.0)
"""What is added to values, as by a bias, hides those that are much smaller."""
ROUNDING: Final = 5e-3
"""How far results may be off: small differences of values that have become smaller are of few digits."""
WHY: Final = (
    "it looks at single values ({name}), and when all values are of another size, its results are no longer those that "
    "follow from microbatches'"
)
_LEAVES_TORCH: Final = frozenset({"item", "float", "int", "index", "bool", "complex", "tolist", "numpy", "array"})
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
