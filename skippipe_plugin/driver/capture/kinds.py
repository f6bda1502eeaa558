"""Kinds of values in a batch: arrays, sequences, what has fields, and what is one thing for all samples."""

from __future__ import annotations

import array
from collections import UserDict
from collections.abc import Hashable, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

ATOMS: Final = (
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    type(None),
    type,
    FunctionType,
    ModuleType,
    np.generic,
    torch.Size,
)


_PLAIN: Final = frozenset((str, bytes, bool, int, float, complex, type(None)))


def is_array(value: Any) -> bool:
    """Whether it is a tensor or a numpy array."""
    return isinstance(value, (Tensor, np.ndarray))


def is_sequence(value: Any) -> bool:
    """Whether its entries are known by number only: a named tuple has fields."""
    if isinstance(value, (PackedSequence, torch.Size)) or hasattr(value, "_fields"):
        return False
    return isinstance(value, (list, tuple, range, array.array))


def has_fields(value: Any) -> bool:
    """Whether it holds fields: a mapping, a named tuple, a dataclass or a namespace."""
    if isinstance(value, (Mapping, UserDict, SimpleNamespace)) or hasattr(value, "_fields"):
        return True
    return is_dataclass(value) and not isinstance(value, type)


def parts(value: Any) -> list[tuple[str, Any]]:
    """Return what a value holds, with how it is reached."""
    if isinstance(value, (Mapping, UserDict)):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, SimpleNamespace):
        return [(f".{name}", item) for name, item in vars(value).items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if is_sequence(value):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f".{name}", getattr(value, name)) for name in names_of(value)]
    return []


def names_of(value: Any) -> list[str]:
    """Return the names of a dataclass's fields, and of whatever else was set on it."""
    names = [each.name for each in fields(value) if hasattr(value, each.name)]
    return [*names, *(name for name in getattr(value, "__dict__", ()) if name not in names)]


def plain_form(value: Any) -> Hashable:
    """Return what two values have in common of which only the numbers and texts differ; None: that cannot be told.

    >>> plain_form([torch.zeros(4, 2), 7]) == plain_form([torch.ones(4, 2), 8])
    True
    >>> plain_form([torch.zeros(4, 2)]) == plain_form([torch.zeros(3, 2)])
    False
    >>> plain_form([set()])
    """
    kind = type(value)
    if kind is Tensor:
        return (value.shape, value.dtype) if value.layout is torch.strided and not value.is_nested else None
    if kind in _PLAIN:
        return kind.__name__
    if kind is dict:
        names, held = tuple(value), value.values()
        if not all(type(name) is str for name in names):
            return None
    elif kind is list or kind is tuple:
        names, held = (), value
    else:
        return None
    forms = tuple(map(plain_form, held))
    return None if None in forms else (kind.__name__, names, forms)


def holds_entries(value: Any, depth: int = 6) -> bool:
    """Whether there is an array with a first dimension, or an object, in ``value``."""
    if is_array(value):
        return bool(value.ndim)
    if isinstance(value, ATOMS):
        return False
    if is_sequence(value) or has_fields(value):
        return depth > 0 and any(holds_entries(item, depth - 1) for _, item in parts(value))
    return True


def holds_arrays(value: Any, depth: int = 3) -> bool:
    """Whether there is an array with a first dimension somewhere in an object's attributes."""
    if isinstance(value, ATOMS):
        return False
    if is_array(value):
        return bool(value.ndim)
    if depth == 0:
        return False
    held = [item for _, item in parts(value)]
    if not held:
        names = [
            name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)
        ]
        held = [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in names)]
    return any(holds_arrays(item, depth - 1) for item in held[:64])
