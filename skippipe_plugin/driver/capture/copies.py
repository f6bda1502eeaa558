"""Copies of single things that user code may change in place: each is brought back, and tells what has changed."""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...engine.errors import SkipPipeError
from ...engine.gradient_hooks import tables_of
from ...engine.outer_names import OuterName
from .outer_state import generator_undo

CONTAINERS: Final = (dict, list, set, deque)
LARGE: Final = 1 << 20
"""Larger tensors are looked at by how often they were written to, before they are compared."""
TORCHS: Final = frozenset(vars(nn.Module()))
"""What torch keeps in a module."""
_TOO_LARGE: Final = (
    "{name}, of {count} elements, was changed in place by a step that was tried before its first batch, and is too "
    "large to be copied for that. Change it where a batch is over (on_train_batch_end, or in the loop)"
)


class Copied(Protocol):
    """Something as it was."""

    name: str

    def restore(self) -> None:
        """Bring it back."""

    def changes(self) -> Iterator[tuple[str, Any]]:
        """Return, by name, what is another than it was; what is gone is None."""


@dataclass(slots=True)
class CopiedTensor:
    """A tensor's value; without a copy only whether it was written to is known."""

    name: str
    value: Tensor
    copy: Tensor | None
    version: int | None
    memory: Tensor
    """Its memory, which code may exchange for another tensor's."""

    def _is_elsewhere(self) -> bool:
        return self.value.data_ptr() != self.memory.data_ptr() or self.value.shape != self.memory.shape

    def _is_another(self) -> bool:
        if self.copy is None:
            return _version(self.value) != self.version
        if self.value.numel() > LARGE and _version(self.value) == self.version:
            return False
        return not torch.equal(self.value, self.copy)

    def restore(self) -> None:
        if self._is_elsewhere():
            self.value.data = self.memory
        if not self._is_another():
            return
        if self.copy is None:
            self.version = _version(self.value)
            raise SkipPipeError(_TOO_LARGE.format(name=self.name or "a tensor", count=self.value.numel()))
        self.value.data.copy_(self.copy)

    def changes(self) -> Iterator[tuple[str, Any]]:
        if self._is_elsewhere() or self._is_another():
            yield self.name, self.value.detach().clone()


def tensor_copy(name: str, value: Tensor, *, is_copied: bool) -> CopiedTensor:
    """Note a tensor."""
    copy = value.detach().clone() if is_copied else None
    return CopiedTensor(name, value, copy, _version(value), value.detach())


def _version(value: Tensor) -> int | None:
    return None if value.is_inference() else value._version


@dataclass(slots=True)
class CopiedFlag:
    """Whether a tensor requires a gradient."""

    name: str
    value: Tensor
    requires_grad: bool

    @classmethod
    def of(cls, name: str, value: Tensor) -> CopiedFlag:
        """Note it."""
        return cls(name, value, value.requires_grad)

    def restore(self) -> None:
        if self.value.requires_grad != self.requires_grad and self.value.is_leaf:
            self.value.requires_grad_(self.requires_grad)

    def changes(self) -> Iterator[tuple[str, Any]]:
        if self.value.requires_grad != self.requires_grad:
            yield f"{self.name}.requires_grad", self.value.requires_grad


@dataclass(slots=True)
class CopiedHooks:
    """The hooks on a leaf's gradients; what stands in their places meanwhile stays there."""

    name: str
    leaf: Tensor
    hooks: tuple[dict[int, Any], ...]

    @classmethod
    def of(cls, name: str, leaf: Tensor) -> CopiedHooks:
        """Note them."""
        return cls(name, leaf, tuple(dict(table or {}) for table in tables_of(leaf)))

    def restore(self) -> None:
        for table, hooks in zip(tables_of(self.leaf), self.hooks, strict=True):
            if table is not None and table.keys() != hooks.keys():
                for number in table.keys() - hooks.keys():
                    del table[number]
                table.update({number: hook for number, hook in hooks.items() if number not in table})

    def changes(self) -> Iterator[tuple[str, Any]]:
        pairs = zip(tables_of(self.leaf), self.hooks, strict=True)
        numbers = [(len(table or ()), (table or {}).keys() == hooks.keys()) for table, hooks in pairs]
        if not all(is_same for _, is_same in numbers):
            yield f"the hooks on the gradient of {self.name}", [count for count, _ in numbers]


@dataclass(slots=True)
class CopiedArray:
    """The content of an array of numpy's."""

    name: str
    value: np.ndarray[Any, Any]
    copy: np.ndarray[Any, Any]

    def restore(self) -> None:
        np.copyto(self.value, self.copy)

    def changes(self) -> Iterator[tuple[str, Any]]:
        if not np.array_equal(self.value, self.copy):
            yield self.name, self.value.copy()


@dataclass(slots=True)
class CopiedContainer:
    """What a container holds: the same objects in the same places."""

    name: str
    value: Any
    copy: Any
    hidden: frozenset[str]
    """Keys of which nothing is said."""

    def restore(self) -> None:
        value, copy = self.value, self.copy
        if isinstance(value, dict):
            if not _are_same(value.values(), copy.values()) or not _are_same(value.keys(), copy.keys()):
                base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
                base.clear(value)
                base.update(value, copy)
        elif isinstance(value, set):
            if value != copy:
                value.clear()
                value.update(copy)
        elif not _are_same(value, copy):
            value.clear()
            value.extend(copy)

    def changes(self) -> Iterator[tuple[str, Any]]:
        value, copy = self.value, self.copy
        if isinstance(value, dict):
            hidden = self.hidden | (TORCHS if copy.keys() >= TORCHS else frozenset())
            yield from ((joined(self.name, key), kept(item)) for key, item in _differing(value, copy, hidden))
        elif isinstance(value, set):
            if value != copy:
                yield self.name, len(value)
        elif not _are_same(value, copy):
            yield self.name, [kept(item) for item in value]


def container_copy(name: str, value: Any, hidden: frozenset[str]) -> CopiedContainer:
    """Note a container, of whatever class that is derived from Python's."""
    if isinstance(value, dict):
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # an ordered one has an order of its own
        copy: Any = dict(zip(base.keys(value), base.values(value), strict=True))
    else:
        copy = next(each for each in CONTAINERS if isinstance(value, each)).copy(value)
    return CopiedContainer(name, value, copy, hidden)


@dataclass(slots=True)
class CopiedNames:
    """What names mean that stand in no dictionary: attributes in slots, entries of a class, variables of a closure."""

    name: str
    read: Callable[[], dict[str, Any]]
    write: Callable[[str, Any], object]
    erase: Callable[[str], object]
    copy: dict[str, Any]

    def restore(self) -> None:
        now = self.read()
        for key in now.keys() - self.copy.keys():
            self.erase(key)
        for key, value in self.copy.items():
            if now.get(key, self) is not value:
                self.write(key, value)

    def changes(self) -> Iterator[tuple[str, Any]]:
        yield from ((joined(self.name, key), kept(item)) for key, item in _differing(self.read(), self.copy))


@dataclass(slots=True)
class CopiedName:
    """What a global name means."""

    name: str
    outer: OuterName
    value: Any

    def restore(self) -> None:
        if self.outer.value() is not self.value:
            self.outer.namespace[self.outer.name] = self.value

    def changes(self) -> Iterator[tuple[str, Any]]:
        if (now := self.outer.value()) is not self.value:
            yield self.outer.name, kept(now)


@dataclass(slots=True)
class CopiedGenerator:
    """Where a random generator is."""

    name: str
    value: Any
    undo: Callable[[], object]
    state: str

    def restore(self) -> None:
        self.undo()

    def changes(self) -> Iterator[tuple[str, Any]]:
        if (now := _state(self.value)) != self.state:
            yield self.name, now


def generator_copy(name: str, value: Any) -> CopiedGenerator | None:
    """Note a random generator; None for all else."""
    undo = generator_undo(value)
    return None if undo is None else CopiedGenerator(name, value, undo, _state(value))


def _state(generator: Any) -> str:
    """Name where a generator is; torch's own draw the same by another way where a step is tried."""
    if isinstance(generator, torch.Generator):
        return ""
    return hashlib.sha256(pickle.dumps(generator)).hexdigest()


def joined(name: str, key: Any) -> str:
    """Return how users call what is in ``name``; nothing for what has none."""
    if not name:
        return ""
    return f"{name}.{key}" if isinstance(key, str) and key.isidentifier() else f"{name}[{key!r}]"


def kept(value: Any) -> Any:
    """Return ``value`` as it is now, whatever becomes of the tensors in it; nothing is said of those elsewhere."""

    def copied(tensor: Tensor) -> Any:
        return tensor.detach().clone() if type(tensor) is Tensor and not tensor.is_meta else type(tensor)

    return pytree.tree_map_only(Tensor, copied, value)


def _differing(
    value: dict[Any, Any], copy: dict[Any, Any], hidden: frozenset[str] = frozenset()
) -> Iterator[tuple[Any, Any]]:
    missing = object()
    for key, item in value.items():
        if key not in hidden and copy.get(key, missing) is not item:
            yield key, item
    yield from ((key, None) for key in copy if key not in value and key not in hidden)


def _are_same(value: Any, copy: Sequence[Any]) -> bool:
    """Whether both hold the same objects, in the same order."""
    return len(value) == len(copy) and all(map(is_, value, copy))
