"""What a step's code may keep outside of its module: global names, class attributes, random generators of its own.

Where a step runs once to be looked at, or is given up and begins again, these are brought back like attributes.
"""

from __future__ import annotations

import functools
import random
import sys
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...engine.outer_names import OuterName, outer_names

_LIBRARIES: Final = ("torch", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "peft", "accelerate")
_PACKAGES: Final = frozenset((*_LIBRARIES, "numpy", "skippipe_plugin", "builtins"))
"""What these keep outside of their modules is theirs to keep."""
_METHODS: Final = (types.FunctionType, staticmethod, classmethod, property)


@dataclass(frozen=True, slots=True)
class Code:
    """What the code of a class or of a function refers to."""

    names: list[OuterName]
    """The user's global names that it reads."""
    functions: list[types.FunctionType]
    """Those with values of their own: variables of the function around them, attributes, defaults that may change."""


_FOUND: Final[weakref.WeakKeyDictionary[Any, Code]] = weakref.WeakKeyDictionary()


def code_of(owner: type | types.FunctionType) -> Code:
    """Return what a class or function of the user's refers to; found once for each."""
    if owner not in _FOUND:
        cls = owner if isinstance(owner, type) else type("function", (), {"function": owner})
        names = [each for each in outer_names([cls]) if is_users(each.module) and _may_hold(each.value())]
        _FOUND[owner] = Code(names, [each for each in _functions(cls) if _has_values(each)])
    return _FOUND[owner]


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether a module is neither Python's nor one of the libraries that a step is made with."""
    package = (module or "").partition(".")[0]
    return package == "__main__" or (package not in _PACKAGES and package not in sys.stdlib_module_names)


def entries(cls: type) -> dict[str, Any]:
    """Return what stands in a class, its methods aside."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith(("__", "_abc_")) and not isinstance(value, _METHODS) and not hasattr(value, "__get__")
    }


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


def _may_hold(value: Any) -> bool:
    """Whether something may be kept in what a global name means; of modules, the names that are read are looked at."""
    if isinstance(value, (type, types.FunctionType)):
        return is_users(value.__module__)
    return not isinstance(value, (types.ModuleType, types.BuiltinFunctionType))


def _functions(cls: type) -> list[types.FunctionType]:
    found = []
    for value in vars(cls).values():
        inner = [value.fget, value.fset, value.fdel] if isinstance(value, property) else [value]
        plain = [getattr(each, "__func__", each) for each in inner]
        found += [each for each in plain if isinstance(each, types.FunctionType)]
    return found


def _has_values(function: types.FunctionType) -> bool:
    return bool(function.__closure__ or function.__dict__ or function.__defaults__ or function.__kwdefaults__)
