"""What a step's code may keep outside of its module: global names, class attributes, random generators of its own.

Where a step runs once to be looked at, or is given up and begins again, these are brought back like attributes.
"""

from __future__ import annotations

import functools
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from ...engine.outer_names import OuterName, outer_names

_LIBRARIES: Final = ("torch", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "peft", "accelerate")
_PACKAGES: Final = frozenset((*_LIBRARIES, "numpy", "skippipe_plugin", "builtins"))
"""What these keep outside of their modules is theirs to keep."""
_FOUND: Final[weakref.WeakKeyDictionary[nn.Module, list[OuterName]]] = weakref.WeakKeyDictionary()
_FUNCTIONS: Final = (types.FunctionType, staticmethod, classmethod, property, types.ModuleType, type)


class OuterState:
    """The global names that the code of a module's classes reads, and what stands in these classes, as they are now.

    Args:
        module: Whose code it is, its parts included.
    """

    def __init__(self, module: nn.Module) -> None:
        classes = own_classes(module)
        self._names = [(each, each.value()) for each in _names(module, classes)]
        self._entries = [(cls, _entries(cls)) for cls in classes]

    def values(self) -> Iterator[tuple[str, Any]]:  # Any: whatever the user keeps there
        """Return, with its name, what is kept there and may be changed in place."""
        for each, value in self._names:
            yield each.name, value
        for cls, entries in self._entries:
            yield from ((f"{cls.__name__}.{name}", value) for name, value in entries.items())

    def changes(self) -> Iterator[tuple[str, Any]]:
        """Return the names that mean something else by now, and what; None where there is no such name any more."""
        for each, value in self._names:
            if (now := each.value()) is not value:
                yield each.name, now
        for cls, before in self._entries:
            entries = _entries(cls)
            for name in entries.keys() | before.keys():
                if entries.get(name, _entries) is not before.get(name, _entries):
                    yield f"{cls.__name__}.{name}", entries.get(name)

    def rebind(self) -> None:
        """Let every name mean again what it meant; what is changed in place is left alone."""
        for each, value in self._names:
            if each.value() is not value:
                each.namespace[each.name] = value
        for cls, before in self._entries:
            now = _entries(cls)
            for name in now.keys() - before.keys():
                delattr(cls, name)
            for name, value in before.items():
                if now.get(name, _entries) is not value:
                    setattr(cls, name, value)


def own_classes(module: nn.Module) -> tuple[type, ...]:
    """Return the classes of ``module`` and its parts that are no library's."""
    classes = dict.fromkeys(cls for part in module.modules() for cls in type(part).__mro__)
    return tuple(cls for cls in classes if cls.__module__.partition(".")[0] not in _PACKAGES)


def generator_undo(value: Any) -> Callable[[], object] | None:
    """Return what sets a random generator (torch's, Python's or numpy's) to where it is now; None for all else."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _names(module: nn.Module, classes: tuple[type, ...]) -> list[OuterName]:
    """Return what the methods read, and the functions that the module has in attributes; found once for each module."""
    if module not in _FOUND:
        attributes = [value for part in module.modules() for value in vars(part).values()]
        functions = {str(n): value for n, value in enumerate(attributes) if isinstance(value, types.FunctionType)}
        found = outer_names([*classes, type("attributes", (), functions)])
        _FOUND[module] = [each for each in found if _is_users(each) and _is_data(each.value())]
    return _FOUND[module]


def _is_users(name: OuterName) -> bool:
    return name.module.partition(".")[0] not in _PACKAGES


def _is_data(value: Any) -> bool:
    return not isinstance(value, _FUNCTIONS) and not isinstance(value, types.BuiltinFunctionType)


def _entries(cls: type) -> dict[str, Any]:
    entries = vars(cls).items()
    return {
        name: value
        for name, value in entries
        if not (name.startswith("__") or name.startswith("_abc_")) and _is_data(value) and not hasattr(value, "__get__")
    }
