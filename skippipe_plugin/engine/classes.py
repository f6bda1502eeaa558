"""Whether another process has the same classes and registered functions, or a script has changed them in this one.

A worker imports the classes of its blocks anew. What a script has put into an imported class (a patched ``forward``, a
constant), into torch's functions or into transformers' registry of attention is not there then. Functions that no code
calls do not count: libraries add aliases to each other's classes in whichever process imports them (Lightning's demos
add ``reset_parameters`` to torch's attention).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
import torch.nn.functional
from torch import nn

from .errors import SkipPipeError
from .outer_names import OuterName, contents, counts, outer_names, readable_names

_CONSTANTS: Final = (int, float, complex, str, bytes, bool, type(None))
_ATTENTION: Final = "transformers' attention"
_READ: Final = "names that the blocks' code reads"
Prints = dict[str, dict[str, str]]
"""By class (or registry): a print of each thing in it."""


def fingerprints(blocks: Iterable[nn.Module]) -> Prints:
    """Return what another process compares with its own, see :func:`check_fingerprints`."""
    modules = [module for block in blocks for module in block.modules()]
    classes = list(dict.fromkeys(cls for module in modules for cls in type(module).__mro__))
    read = readable_names(classes)
    found = {_name(cls): _prints(_that_count(vars(cls), read)) for cls in imported_classes(modules)}
    for each in outer_names(classes):
        if _is_importable(each) and (text := _print_outer(each.value())):
            found.setdefault(f"{each.module}:", {})[each.name] = text
    for module in (torch, torch.nn.functional):
        foreign = {name: value for name, value in vars(module).items() if _is_foreign(value)}
        if foreign:
            found.setdefault(f"{module.__name__}:", {}).update(_prints(foreign))
    attention = {
        name: value
        for name in {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules}
        if isinstance(name, str) and (value := _attention(name)) is not None
    }
    return found | {_READ: dict.fromkeys(sorted(read), "")} | ({_ATTENTION: _prints(attention)} if attention else {})


def check_fingerprints(sent: Mapping[str, Mapping[str, str]]) -> None:
    """Compare what another process has with what is here.

    Raises:
        SkipPipeError: Something there was changed after it was imported.
    """
    for owner, prints in sent.items():
        if owner == _READ:
            continue
        if owner != _ATTENTION:
            importlib.import_module(owner.partition(":")[0])  # what is compared may be more than came along
        if owner == _ATTENTION:
            here = _prints({name: value for name in prints if (value := _attention(name)) is not None})
        elif not owner.partition(":")[2]:
            module = vars(_find(owner))
            here = {name: _print_outer(module[name]) for name in prints if name in module}
        else:
            here = _prints(_that_count(vars(_find(owner)), sent.get(_READ, {})))
        for name in sorted(prints.keys() | (here.keys() if owner.partition(":")[2] else set())):
            if prints.get(name) != here.get(name):
                raise SkipPipeError(_explained(owner, name))


def imported_classes(modules: Iterable[nn.Module]) -> list[type]:
    """Return the classes of ``modules`` that another process imports, their bases included but ``nn.Module``."""
    classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__)
    return [cls for cls in classes if cls not in (nn.Module, object) and _is_imported(cls)]


def _explained(owner: str, name: str) -> str:
    what = f"{owner.replace(':', '.').strip('.')}.{name}"
    if owner == _ATTENTION:
        what = f"the function {name!r} that is registered as attention of transformers"
    return (
        f"{what} was patched or registered by the script: workers import the class anew and have another one (or "
        "none). Subclass the block's class in your own code and use that, or make the change in a module that the "
        "blocks' classes are imported from, so that every process that imports them makes it"
    )


def _is_imported(cls: type) -> bool:
    if cls.__module__ == "__main__":
        return False
    try:
        return _find(_name(cls)) is cls
    except (AttributeError, KeyError):
        return False


def _is_importable(outer: OuterName) -> bool:
    """Whether another process finds the name in a module of its own; what a script's classes read travels with them."""
    module = sys.modules.get(outer.module)
    return outer.module != "__main__" and module is not None and vars(module) is outer.namespace


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _find(name: str) -> Any:  # Any: a class or a module
    module, _, path = name.partition(":")
    found: Any = sys.modules[module]
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _attention(name: str) -> Any:  # Any: whatever was registered
    module = sys.modules.get("transformers.modeling_utils")
    functions = getattr(module, "ALL_ATTENTION_FUNCTIONS", None)
    return functions[name] if functions is not None and name in functions else None


def _is_foreign(value: object) -> bool:
    return isinstance(value, types.FunctionType) and str(value.__module__).partition(".")[0] not in ("torch", "typing")


def _prints(entries: Mapping[str, Any]) -> dict[str, str]:
    pairs = ((name, _print(value, 0)) for name, value in entries.items() if not _is_pythons(name))
    return {name: text for name, text in pairs if text}


def _that_count(entries: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if counts(read, name, value)}


def _is_pythons(name: str) -> bool:
    """Whether an entry of a class is written by Python or differs from process to process anyway."""
    return name.startswith("_abc_") or name in (
        "__module__",
        "__dict__",
        "__weakref__",
        "__doc__",
        "__firstlineno__",
        "__annotations__",
    )


def _print(value: Any, depth: int) -> str:  # Any: whatever stands in a class
    """Return the same text in every process for the same code or constant; none for what cannot be compared."""
    if isinstance(value, (staticmethod, classmethod)):
        return _print(value.__func__, depth)
    if isinstance(value, property):
        return "".join(_print(each, depth) for each in (value.fget, value.fset, value.fdel) if each is not None)
    if isinstance(value, functools.partial):
        return _print(value.func, depth)
    if isinstance(value, types.FunctionType) and depth < 4:
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        inside = "".join(_print(each, depth + 1) for each in cells if isinstance(each, types.FunctionType))
        return hashlib.blake2b(f"{_of_code(value.__code__)}{inside}".encode(), digest_size=8).hexdigest()
    if isinstance(value, types.BuiltinFunctionType):
        return value.__qualname__
    return repr(value) if type(value) in _CONSTANTS else ""


def _print_outer(value: Any) -> str:  # Any: whatever stands in a module
    return _print(value, 0) or contents(value)


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _of_code(code: types.CodeType) -> str:
    return f"{code.co_code.hex()}{code.co_names}{code.co_varnames}{list(_of_constants(code.co_consts))}"


def _of_constants(constants: Iterable[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, types.CodeType):
            yield _of_code(constant)
        elif isinstance(constant, frozenset):
            yield str(sorted(map(repr, constant)))
        elif isinstance(constant, tuple):
            yield str(list(_of_constants(constant)))
        else:
            yield repr(constant)
