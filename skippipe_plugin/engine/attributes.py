"""Plain attributes of a block and its submodules: which there are, whether any has changed, and how changes travel.

Parameters, buffers and submodules are torch's own and not meant here, nor is what torch and this library note in a
module. Values are compared by portraits: numbers and strings by value, containers and objects by their content, all
else (tensors, functions, modules) by identity, tensors also by how often they were written to.
"""

from __future__ import annotations

import copy
import enum
import functools
import hashlib
import io
import itertools
import operator
import pickle
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import cloudpickle
import torch
from torch import Tensor, nn

from .memory_order import laid, order_of
from .transport import as_bytes

Key = tuple[int, str]
"""An attribute of a block: the number of its module in the order of ``modules()``, and its name."""
Portrait = Any  # Any: nested tuples that compare by value

_BOOKKEEPING: Final = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "_is_hf_initialized", "_flat_weight_refs"}
_PLAIN: Final = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size, range)
_WHOLE: Final = (
    nn.Module,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
    enum.Enum,
    torch.Generator,
)
"""What is not looked into."""
_DEEPEST: Final = 40


def is_own(name: str) -> bool:
    """Whether an entry of a module's ``__dict__`` is the user's."""
    return name not in _BOOKKEEPING and not name.startswith("_skippipe_")


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of one module, without those of its submodules."""
    return {name: value for name, value in vars(module).items() if is_own(name)}


class _Same:
    """Compares by identity."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value


@dataclass(slots=True)
class _Found:
    """The things inside of attributes whose content may change while their identity does not."""

    dicts: list[dict[Any, Any]] = field(default_factory=list)
    lists: list[Any] = field(default_factory=list)
    sets: list[Any] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    arrays: list[Any] = field(default_factory=list)
    memo: dict[int, tuple[object, Portrait]] = field(default_factory=dict)
    """By ``id``: the thing itself, so that its id stays its own, and its portrait."""


def _portrait(value: Any, found: _Found, depth: int = 0) -> Portrait:
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind in (float, complex):
        return kind, repr(value)  # NaN is NaN here, and -0.0 is not 0.0
    if id(value) not in found.memo:
        found.memo[id(value)] = value, "itself"  # what contains itself ends here
        found.memo[id(value)] = value, _look_into(value, kind, found, depth + 1)
    return found.memo[id(value)][1]


def _look_into(value: Any, kind: type, found: _Found, depth: int) -> Portrait:
    if isinstance(value, Tensor):
        return _Same(value), _version(value, found)
    if isinstance(value, _WHOLE) or depth > _DEEPEST:
        return _Same(value)
    if isinstance(value, weakref.ref):
        return _Same(value())
    inside: Portrait = ()
    if isinstance(value, dict):
        found.dicts.append(value)
        inside = tuple((_portrait(key, found, depth), _portrait(item, found, depth)) for key, item in value.items())
    elif isinstance(value, (list, tuple, deque)):
        if not isinstance(value, tuple):
            found.lists.append(value)
        inside = tuple(_portrait(item, found, depth) for item in value)
    elif isinstance(value, (set, frozenset)):
        found.sets.append(value)
        inside = frozenset(value)
    elif kind.__module__ == "numpy" and hasattr(value, "tobytes"):
        found.arrays.append(value)
        return kind, _digest(value)
    elif not _has_state(value):
        return _Same(value)
    return kind, inside, _portrait(_state_of(value, found), found, depth)


def _has_state(value: object) -> bool:
    return hasattr(value, "__dict__") or bool(_slots(type(value)))


def _state_of(value: object, found: _Found) -> Any:  # Any: a dictionary of whatever the object holds
    """Return the object's own attributes; the dictionary itself is watched."""
    state = getattr(value, "__dict__", None)
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return (state, tuple(slots.items())) if slots else state


def _slots(kind: type) -> list[str]:
    named = (vars(each).get("__slots__", ()) for each in kind.__mro__)
    slots = itertools.chain.from_iterable((names,) if isinstance(names, str) else names for names in named)
    return [name for name in slots if name not in ("__dict__", "__weakref__")]


def _version(tensor: Tensor, found: _Found) -> int:
    if isinstance(tensor, nn.Parameter) or tensor.is_meta or tensor.is_inference():
        return 0  # weights are written to in every step
    found.tensors.append(tensor)
    return tensor._version


def _digest(array: Any) -> str:  # Any: numpy need not be installed
    return hashlib.blake2b(f"{array.dtype}{array.shape}".encode() + array.tobytes(), digest_size=16).hexdigest()


class BlockWatch:
    """Tells cheaply whether any attribute of a block's modules is another than when it was last looked at.

    Args:
        block: The block.
        ignored: Attributes that are left out.
    """

    def __init__(self, block: nn.Module, ignored: Collection[Key] = ()) -> None:
        self.modules = list(block.modules())
        self._block = block
        self._ignored = frozenset(ignored)
        self.portraits: dict[Key, Portrait] = {}
        """By attribute: what it was at the last :meth:`look`."""
        self.look()

    def look(self) -> None:
        """Look at everything anew."""
        with torch._C.DisableTorchFunctionSubclass():
            found, self.portraits = _Found(), {}
            for index, module in enumerate(self.modules):
                for name, value in vars(module).items():
                    if is_own(name) and (index, name) not in self._ignored:
                        self.portraits[index, name] = _portrait(value, found)
            self._note(found)

    def unchanged(self) -> bool:
        """Whether everything is what it was at the last :meth:`look`, ``training`` and the submodules included."""
        try:
            if self._is_plain:  # as most are, and this is asked at every call of a block
                own = itertools.chain.from_iterable(map(operator.call, self._getters, self._owns))
                return [*map(len, self._sized)] == self._lengths and all(map(operator.is_, own, self._flat))
            return (
                self._count() == self._lengths
                and all(map(operator.is_, self._items(), self._flat))
                and (not self._contents or self._read_contents() == self._contents)
            )
        except (KeyError, RuntimeError):  # an attribute is gone, or a dictionary changes as it is read
            return False

    def differences(self) -> set[Key]:
        """Return which attributes are not what they were at the last :meth:`look`, and look anew."""
        before = self.portraits
        self.look()
        now = self.portraits
        return {key for key in now.keys() | before.keys() if key not in now or now[key] != before.get(key)}

    def has_same_modules(self) -> bool:
        """Whether no submodule was added, replaced or removed."""
        now = list(self._block.modules())
        return len(now) == len(self.modules) and all(map(operator.is_, now, self.modules))

    def _note(self, found: _Found) -> None:
        owns = [vars(module) for module in self.modules]
        children = [own["_modules"] for own in owns if own["_modules"]]
        self._getters: list[Callable[[Any], Any]] = []
        self._owns = owns
        for index, own in enumerate(owns):
            names = [name for name in own if is_own(name) and (index, name) not in self._ignored]
            self._getters.append(operator.itemgetter("training", "_modules", *names))
        self._dicts = [*children, *found.dicts]
        self._lists = found.lists
        ignored = sorted({index for index, _ in self._ignored})
        self._sized = [own for index, own in enumerate(owns) if index not in ignored] + self._dicts + self._lists
        self._ignoring = [(owns[at], [name for index, name in self._ignored if index == at]) for at in ignored]
        self._lengths = self._count()
        self._flat = list(self._items())
        self._found = found
        self._contents = self._read_contents() if found.sets or found.tensors or found.arrays else ()
        self._is_plain = not (self._ignoring or self._dicts or self._lists or self._contents)

    def _count(self) -> list[int]:
        """Return how many things are in each dictionary and list, those aside that may come and go."""
        counts = list(map(len, self._sized))
        if self._ignoring:
            counts += [len(own) - sum(name in own for name in names) for own, names in self._ignoring]
        return counts

    def _items(self) -> Iterator[Any]:
        chain = itertools.chain.from_iterable
        own = map(operator.call, self._getters, self._owns)
        if not self._lists and not self._dicts:
            return chain(own)
        return chain([*own, *map(dict.values, self._dicts), *self._dicts, *self._lists])

    def _read_contents(self) -> tuple[Any, ...]:
        found = self._found
        with torch._C.DisableTorchFunctionSubclass():
            versions = tuple([tensor._version for tensor in found.tensors])
        return versions, tuple(map(frozenset, found.sets)), tuple(map(_digest, found.arrays))


def named_attributes(block: nn.Module, keys: Iterable[Key]) -> list[str]:
    """Name attributes as code that has the block does."""
    paths = [path for path, _ in block.named_modules()]
    return [".".join(filter(None, (paths[index], name))) for index, name in keys]


@contextmanager
def attributes_kept(block: nn.Module) -> Iterator[None]:
    """Let code do to the attributes of a block what it likes: afterwards they are what they were."""
    modules = list(block.modules())
    kept = [own_attributes(module) for module in modules]
    memo: dict[int, Any] = {id(each): each for each in (*modules, *block.parameters(), *block.buffers())}
    for module, attributes in zip(modules, kept, strict=True):
        vars(module).update({name: copied(value, memo) for name, value in attributes.items()})
    try:
        yield
    finally:
        for module, attributes in zip(modules, kept, strict=True):
            for name in own_attributes(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)


def have_equal_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are alike, NaN included."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta or other.is_meta:
        return False
    return torch.equal(as_bytes(one), as_bytes(laid(other, order_of(one))))


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of an attribute; what cannot be copied is there once."""
    if type(value) in _PLAIN or isinstance(value, _WHOLE):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, tensors of a graph: there is one of them only
        return value


# ------------------------------------------------------------------- travel


class _Gone:
    """Stands for an attribute that is not there any more."""

    def __reduce__(self) -> str:
        return "GONE"


GONE: Final = _Gone()


def pack_changes(changes: Mapping[Key, Any], block: nn.Module) -> tuple[bytes, list[Tensor]]:
    """Return attributes pickled, and the tensors in them, which travel apart; weights of ``block`` stay where they are.

    Raises:
        Exception: Something cannot be pickled.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, {id(p): name for name, p in (*block.named_parameters(), *block.named_buffers())})
    pickler.dump(dict(changes))
    return buffer.getvalue(), pickler.tensors


def apply_changes(block: nn.Module, packed: bytes, tensors: Sequence[Tensor]) -> None:
    """Set the attributes that :func:`pack_changes` has packed on another copy of the block."""
    modules = list(block.modules())
    changes: dict[Key, Any] = _Unpickler(io.BytesIO(packed), block, tensors).load()
    for (index, name), value in changes.items():
        if value is GONE:
            vars(modules[index]).pop(name, None)
        else:
            vars(modules[index])[name] = value


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    def __init__(self, file: io.BytesIO, weights: Mapping[int, str]) -> None:
        super().__init__(file)
        self._weights = weights
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) in self._weights:
            return self._weights[id(obj)]
        index = next((index for index, known in enumerate(self.tensors) if known is obj), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(obj)
        return index


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, block: nn.Module, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._block = block
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:  # Any: what persistent_id returned
        if isinstance(pid, int):
            return self._tensors[pid]
        owner, _, name = pid.rpartition(".")
        tensor: Tensor = getattr(self._block.get_submodule(owner), name)
        return tensor
