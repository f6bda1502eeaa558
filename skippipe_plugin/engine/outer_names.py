"""The global names that the code of classes reads: a constant of a module, a function, ``F.gelu``.

Another process has its own: what a script has set there it does not have. Torch's and Python's own code is not looked
into, only what other code reads of them.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

_DEEPEST: Final = 4
"""How many calls from function to function are followed."""
_MOST: Final = 64
"""Containers with more entries are compared by identity alone."""
_PLAIN: Final = (int, float, complex, str, bytes, bool, type(None))


@dataclass(frozen=True, slots=True)
class OuterName:
    """A name in a module (or in the namespace of a script), and who reads it."""

    namespace: dict[str, Any]  # Any: whatever stands in a module
    name: str
    reader: str

    @property
    def module(self) -> str:
        """Name the module whose namespace it is."""
        return str(self.namespace.get("__name__", "__main__"))

    def value(self) -> Any:  # Any: whatever stands in a module
        """Return what it means now."""
        return self.namespace.get(self.name)


def outer_names(classes: Iterable[type]) -> list[OuterName]:
    """Return what the methods of ``classes`` read from outside of them, each name once."""
    found: dict[tuple[int, str], OuterName] = {}
    for cls in classes:
        for function in _functions(vars(cls)):
            for each in _read(function, cls.__qualname__, 0, set()):
                found.setdefault((id(each.namespace), each.name), each)
    return list(found.values())


def readable_names(classes: Iterable[type]) -> set[str]:
    """Return what the methods of ``classes`` may ask an object for: attributes and words in their code.

    Functions that they call are looked into as in :func:`outer_names`; constructors are not, since they have run.
    """
    seen: set[int] = set()
    methods = ({name: value for name, value in vars(cls).items() if name != "__init__"} for cls in classes)
    return {name for each in methods for function in _functions(each) for name in _asked_by(function, 0, seen)}


def counts(read: Collection[str], name: str, value: Any) -> bool:  # Any: whatever stands in a class
    """Whether it matters what ``name`` is in a class: every constant does, functions if code or Python asks for them.

    ``read`` is of :func:`readable_names`.
    """
    if name == "__slotnames__":  # Python notes it there, when an object is copied or pickled for the first time
        return False
    is_function = isinstance(value, (types.FunctionType, staticmethod, classmethod))
    return not is_function or name in read or (name.startswith("__") and name.endswith("__"))


def contents(value: Any) -> str:  # Any: whatever stands in a module
    """Return the content of a small container of plain values; empty for everything else."""
    if not isinstance(value, (dict, list, set)) or len(value) > _MOST:
        return ""
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else [*value]
    return repr(value) if all(isinstance(item, _PLAIN) for item in items) else ""


def _functions(entries: Mapping[str, Any]) -> Iterator[types.FunctionType]:
    for value in entries.values():
        inner = [value.fget, value.fset, value.fdel] if isinstance(value, property) else [value]
        for each in inner:
            plain = getattr(each, "__func__", each)
            if isinstance(plain, types.FunctionType):
                yield plain


def _read(function: types.FunctionType, reader: str, depth: int, seen: set[int]) -> Iterator[OuterName]:
    if id(function) in seen or depth > _DEEPEST or _is_torchs_or_pythons(function.__module__):
        return
    seen.add(id(function))
    namespace = function.__globals__
    for names in _names(function.__code__):
        for name in names:
            if name not in namespace:
                continue
            yield OuterName(namespace, name, reader)
            value = namespace[name]
            if isinstance(value, types.ModuleType) and not _is_pythons(value.__name__):
                yield from (OuterName(vars(value), inner, reader) for inner in names if inner in vars(value))
            elif isinstance(value, types.FunctionType):
                yield from _read(value, reader, depth + 1, seen)


def _asked_by(function: types.FunctionType, depth: int, seen: set[int]) -> Iterator[str]:
    if id(function) in seen or depth > _DEEPEST:
        return
    seen.add(id(function))
    yield from (name for name in _asked(function.__code__) if name != function.__doc__)
    if _is_torchs_or_pythons(function.__module__):
        return
    for names in _names(function.__code__):
        for value in map(function.__globals__.get, names):
            if isinstance(value, types.FunctionType):
                yield from _asked_by(value, depth + 1, seen)


def _asked(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _asked(constant)
        elif isinstance(constant, str):
            yield constant


def _names(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_torchs_or_pythons(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch" or _is_pythons(module or "")


def _is_pythons(module: str) -> bool:
    """Whether a module is of Python itself: what stands there (``sys.argv``) may differ between processes."""
    package = module.partition(".")[0]
    return package != "__main__" and package in sys.stdlib_module_names
