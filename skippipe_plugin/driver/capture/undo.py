"""Take back what the user's code has changed on the driver, before it runs once more."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .outer_state import OuterState, generator_undo
from .randomness import random_states, set_random_states
from .remote import is_remote
from .rewind import rewinder

_NOT_OURS = frozenset({"_parameters", "_buffers", "_modules", "_trainer", "_fabric"})
"""What modules keep apart, and what is no value of theirs."""
_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)


def undo_all(module: nn.Module, device: torch.device, batch: Any) -> Callable[[], None]:
    """Return a function that brings back the module's buffers, metrics and attributes, the batch and all random states.

    So are the global names that the module's code reads. All are brought back one level deep: a list is what it was,
    and the objects in it are the same.
    """
    rewind, draws, unchange = rewinder(module), undo_draws(device), undo_changes(batch)
    attributes = [(part, _attributes(part)) for part in module.modules()]
    outer = OuterState(module)
    outside = [(value, _contents(value)) for _, value in outer.values()]

    def undo() -> None:
        for part, values in attributes:
            _set_attributes(part, values)
        outer.rebind()
        for value, contents in outside:
            if contents is not None:
                _refill(value, contents)
        rewind()
        unchange()
        draws()

    return undo


def undo_draws(device: torch.device) -> Callable[[], None]:
    """Return a function that sets the random states of torch, Python and numpy to what they are now."""
    states, python = random_states(device), random.getstate()
    numpy = sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None

    def undo() -> None:
        set_random_states(device, states)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)

    return undo


def undo_changes(batch: Any) -> Callable[[], None]:  # Any: a batch of the user's
    """Return a function that brings back what containers in ``batch`` hold, and the values of its tensors."""
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


_Value = tuple[Any, Any]  # Any: an attribute of the user's, and a copy of what it contains


def _attributes(part: nn.Module) -> dict[str, _Value]:
    return {name: (value, _contents(value)) for name, value in part.__dict__.items() if name not in _NOT_OURS}


def _contents(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_meta or is_remote(value) else value.detach().clone()
    return value.copy() if type(value) in _CONTAINERS else generator_undo(value)


def _set_attributes(part: nn.Module, values: dict[str, _Value]) -> None:
    for name in part.__dict__.keys() - values.keys() - _NOT_OURS:
        del part.__dict__[name]
    for name, (value, contents) in values.items():
        part.__dict__[name] = value
        if contents is not None:
            _refill(value, contents)


def _refill(value: Any, contents: Any) -> None:
    if isinstance(value, Tensor):
        with torch.no_grad():
            if not torch.equal(value, contents):
                value.copy_(contents)
        return
    if callable(contents):
        contents()
        return
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(contents)
    else:
        value.update(contents)
