"""What the containers and tensors of a batch hold, brought back after user code has changed them."""

from __future__ import annotations

import functools
import io
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...engine.errors import SkipPipeError
from .outer_state import generator_undo
from .remote import is_remote

_TAKEN: Final = (
    "a batch holds a {kind}, and its step has to run once more: what that has given cannot be put back. Make it a list "
    "in the collate function"
)
_CONTAINERS: Final = (list, dict, set, deque, defaultdict, OrderedDict, Counter)


def undo_changes(batch: Any) -> Callable[[], None]:  # Any: a batch of the user's
    """Return a function that brings back what containers in ``batch`` hold, and the values of its tensors.

    It raises :class:`SkipPipeError` where there is an iterator: nobody can know whether something was taken from it.
    """
    kept: dict[int, tuple[Any, Any]] = {}
    _keep(batch, kept)

    def undo() -> None:
        for value, contents in kept.values():
            if contents is not None:
                _refill(value, contents)

    return undo


def _keep(value: Any, kept: dict[int, tuple[Any, Any]]) -> None:
    """Note, by identity, what ``value`` and all in it contain; None where that cannot change."""
    if id(value) in kept or isinstance(value, (type, nn.Module, str, int, float)):
        return
    attributes = None if isinstance(value, Tensor) else getattr(value, "__dict__", None)
    if attributes is not None:
        kept[id(value)] = attributes, attributes.copy()
        parts = attributes
    else:
        kept[id(value)] = value, _contents(value)
        parts = value
    if isinstance(parts, (dict, list, tuple)):
        for part in list(parts.values()) if isinstance(parts, dict) else parts:
            _keep(part, kept)


def _contents(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_meta or is_remote(value) else value.detach().clone()
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        return functools.partial(_refuse, type(value).__name__)
    return value.copy() if type(value) in _CONTAINERS else generator_undo(value)


def _refuse(kind: str) -> None:
    raise SkipPipeError(_TAKEN.format(kind=kind))


def _refill(value: Any, contents: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            if value.layout is not torch.strided or not torch.equal(value, contents):
                value.data.copy_(contents)  # no write that graphs of the caller would count
        return
    if callable(contents):
        contents()
        return
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(contents)
    else:
        value.update(contents)
