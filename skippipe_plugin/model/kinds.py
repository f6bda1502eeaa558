"""What batches have in common that steps are taken to treat alike, and what few of them have."""

from __future__ import annotations

import dataclasses
import math
from collections import UserDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

_FEW: Final = 8
_GROUP: Final = 8


def kind_of(value: Any) -> Hashable:
    """Return the structure of a batch, without sizes: batches of one structure are taken to be treated alike."""
    if isinstance(value, Tensor):
        return value.dtype, value.ndim
    if isinstance(value, (list, tuple)):
        kinds = [kind_of(item) for item in value]
        return (type(value), *kinds) if len(kinds) <= _FEW else (type(value), frozenset(kinds))
    if isinstance(value, (Mapping, UserDict)):
        return tuple((key, kind_of(item)) for key, item in value.items())
    if isinstance(value, bool) or value is None:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple((each.name, kind_of(getattr(value, each.name))) for each in dataclasses.fields(value))
    return f"{type(value).__module__}.{type(value).__qualname__}"


def detail_of(value: Any) -> Hashable:
    """Return the numbers and texts in a batch that are of no sample: a task's name, for instance."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (list, tuple)):
        return tuple(map(detail_of, value)) if len(value) <= _FEW and not _is_per_sample(value) else None
    if isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return (value > 0) - (value < 0)
    if isinstance(value, (Mapping, UserDict)):
        return tuple(detail_of(item) for item in value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(detail_of(getattr(value, each.name)) for each in dataclasses.fields(value))
    return None


def _is_per_sample(items: Sequence[Any]) -> bool:
    """Whether a list holds a number or a text for each sample, and not a batch's parts."""
    return len({*map(type, items)}) == 1 and isinstance(items[0], (str, int, float))


def form_of(sizes: Sequence[int]) -> Hashable:
    """Return of microbatches' sizes what code often depends on: one sample, pairs and groups of a power of two."""
    return len(sizes), min(sizes) == 1, math.gcd(_GROUP, *sizes)
