"""A block's arguments beside its hidden states, as they travel and as the block gets them.

What is the same for most microbatches makes a :class:`Template`: constants, and where tensors go. An object travels
pickled, with its tensors aside, so that what it holds is known, compared and sent like all other tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import cloudpickle
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .computed import Computed
from .errors import SkipPipeError


@dataclass(frozen=True, slots=True)
class SideInput:
    """Stands in a template for the side input in ``slot`` of the microbatch."""

    slot: int


@dataclass(frozen=True, slots=True)
class ArrayInput:
    """Stands for a numpy array whose values are the side input in ``slot``."""

    slot: int


@dataclass(frozen=True, slots=True)
class CacheRef:
    """Stands in a template for the worker's own part of the key-value cache in ``slot`` of the call."""

    slot: int


@dataclass(frozen=True, slots=True)
class HiddenAgain:
    """Stands for the hidden states where a block takes them a second time, as in ``layer(h, h)``."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """Stands for a tensor that a block before has returned, and that was passed on to this one."""

    distance: int
    """How many blocks before: 1 is the last one."""
    number: int
    """Which of the tensors that it has returned; 0 are its hidden states."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An object: its pickled structure, and what stands for the tensors and arrays in it."""

    data: bytes
    parts: tuple[SideInput | ArrayInput | HiddenAgain | Earlier | Computed, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots of the side inputs in it."""
        return tuple(part.slot for part in self.parts if isinstance(part, (SideInput, ArrayInput)))

    @property
    def is_passed_on(self) -> bool:
        """Whether tensors are in it that blocks before have returned."""
        return any(isinstance(part, (HiddenAgain, Earlier, Computed)) for part in self.parts)

    def load(self, leaf: Callable[[Any], Any]) -> Any:  # Any: what the user's model passes
        """Return a new object of the same content; ``leaf`` makes each of its parts."""
        return _Unpickler(io.BytesIO(self.data), list(map(leaf, self.parts))).load()


ATOMS: Final = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, type(Ellipsis)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    }
)
"""Constants that travel as they are: nothing can be in them, and nobody can change them."""
_OURS: Final = frozenset({SideInput, ArrayInput, CacheRef, HiddenAgain, Earlier, Packed, Computed})
_CHANGEABLE: Final = frozenset({list, dict, Packed, ArrayInput})
_LEAVES: Final = ATOMS | _OURS
"""What most arguments are: no containers, so that looking into them can be left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """The arguments of a block without its hidden states: leaves are constants and what stands for a tensor.

    Templates are equal when blocks cannot tell them apart: 1, 1.0 and True differ, and NaN is NaN.
    """

    args: tuple[Any, ...]  # Any: whatever the user's model passes
    kwargs: dict[str, Any]
    hidden: int | str | None
    """Where the hidden states go: the index of a positional argument, or a keyword; None where they stand inside of
    another argument, or nowhere."""
    mutable: tuple[int | str, ...] = field(init=False, repr=False)
    """The arguments that a block could change (a dict, a list, an object), tensors and caches aside."""
    repeats: bool = field(init=False, repr=False)
    """Whether the hidden states stand in it once more, or what blocks before have returned: it differs by block."""
    computes: bool = field(init=False, repr=False)
    """Whether anything in it is computed of what blocks before have returned."""
    is_bare: bool = field(init=False, repr=False)
    """Whether there is nothing but the hidden states."""
    _key: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Derive what is asked often."""
        parts, mutable, repeats, computes = [], [], False, False
        for position, value in (*enumerate(self.args), *self.kwargs.items()):
            traits: set[type] = set()
            parts.append((position, _key(value, traits)))
            repeats |= HiddenAgain in traits or Earlier in traits
            computes |= Computed in traits
            if traits & _CHANGEABLE and CacheRef not in traits:
                mutable.append(position)
        object.__setattr__(self, "_key", (self.hidden, parts))
        object.__setattr__(self, "mutable", tuple(mutable))
        object.__setattr__(self, "repeats", repeats)
        object.__setattr__(self, "computes", computes)
        object.__setattr__(self, "is_bare", self.hidden == 0 and len(self.args) == 1 and not self.kwargs)

    def __reduce__(self) -> tuple[type[Template], tuple[Any, ...]]:
        """Leave out what is derived."""
        return Template, (self.args, self.kwargs, self.hidden)

    def __eq__(self, other: object) -> bool:
        """Compare without asking the arguments themselves, whose comparisons may raise or lie."""
        return isinstance(other, Template) and self._key == other._key

    __hash__ = None  # type: ignore[assignment]

    def fill(self, leaf: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return args and kwargs with ``leaf`` applied to every leaf; the hidden states are still missing."""

        def fill(value: Any) -> Any:  # Any: an argument
            return leaf(value) if type(value) in _LEAVES else pytree.tree_map(leaf, value, is_leaf=_is_leaf)

        return [fill(value) for value in self.args], {name: fill(value) for name, value in self.kwargs.items()}

    def with_leaves(self, change: Callable[[Any], Any]) -> Template:
        """Return a template with ``change`` applied to every leaf."""

        def changed(leaf: Any) -> Any:  # Any: a leaf of the user's arguments
            if isinstance(leaf, Computed):
                return leaf.mapped(changed)
            return replace(leaf, parts=tuple(map(change, leaf.parts))) if isinstance(leaf, Packed) else change(leaf)

        args, kwargs = self.fill(changed)
        return Template(tuple(args), kwargs, self.hidden)

    def slots(self) -> frozenset[int]:
        """Return the slots of all side inputs in it, those inside of objects included."""
        found: set[int] = set()

        def note(leaf: Any) -> Any:  # Any: a leaf of the user's arguments
            found.update(part.slot for part in _parts(leaf) if isinstance(part, (SideInput, ArrayInput)))
            return leaf

        self.fill(note)
        return frozenset(found)

    def has_cache(self) -> bool:
        """Whether a key-value cache stands in it."""
        found: list[Any] = []
        self.fill(lambda leaf: found.append(leaf) if isinstance(leaf, CacheRef) else leaf)
        return bool(found)

    def earlier(self) -> frozenset[Earlier]:
        """Return what stands in it for tensors that blocks before have returned."""
        if not self.repeats:
            return frozenset()
        found: set[Earlier] = set()

        def note(leaf: Any) -> Any:  # Any: a leaf of the user's arguments
            found.update(part for part in _parts(leaf) if isinstance(part, Earlier))
            return leaf

        self.fill(note)
        return frozenset(found)

    def name_of(self, position: int | str | None, forward: Callable[..., Any] | None) -> str:
        """Name an argument for a message, by the parameter of ``forward`` where that is known."""
        if position is None:
            return "with the hidden states"
        if isinstance(position, str):
            return repr(position)
        code = getattr(forward, "__code__", None)
        names = code.co_varnames[1 : code.co_argcount] if code is not None else ()
        return repr(names[position]) if position < len(names) else f"number {position}"


def _parts(leaf: Any) -> Iterator[Any]:  # Any: a leaf of a template
    """Yield what stands for a tensor in a leaf, or the leaf itself."""
    if isinstance(leaf, Packed):
        yield from leaf.parts
    elif isinstance(leaf, Computed):
        for each in leaf.leaves():
            yield from _parts(each)
    else:
        yield leaf


def _is_leaf(value: Any) -> bool:
    return type(value) in _LEAVES


def _key(value: Any, traits: set[type]) -> Any:  # Any: a leaf of a template, or a container of them
    kind = type(value)
    if kind in _OURS:
        traits.add(kind)
        if kind is Packed or kind is Computed:
            traits.update(map(type, _parts(value)))
        if kind is Computed:
            own = value.item, value.ambient, _key(value.args, set()), _key(value.kwargs, set())
            return kind, value.function, *own
        return value
    if kind is float or kind is complex:
        return kind, repr(value)
    if kind in ATOMS:
        return kind, value
    if kind is tuple:
        return kind, tuple(_key(item, traits) for item in value)
    if kind is list or kind is dict:
        traits.add(kind)
        items = value.items() if kind is dict else enumerate(value)
        return kind, tuple((type(name), name, _key(item, traits)) for name, item in items)
    leaves, form = pytree.tree_flatten(value, is_leaf=_is_leaf)
    traits.add(tuple if isinstance(value, tuple) else dict)
    return form, tuple(_key(leaf, traits) for leaf in leaves)


# Objects ------------------------------------------------------------------------------------------


class Packer(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    """Pickles an object; ``aside`` is asked about every part of it, and may return what stands in its place."""

    def __init__(self, file: io.BytesIO, aside: Callable[[Any], object | None]) -> None:
        super().__init__(file)
        self.persistent_id = aside


def settled(data: bytes, parts: tuple[SideInput | ArrayInput | HiddenAgain | Earlier | Computed, ...]) -> Packed:
    """Return a packed object such that equal ones are equal: classes of a script travel by value.

    How pickle writes those depends on which of their equal names are one object.
    """
    packed = Packed(data, parts)
    if b"_make_skeleton_class" not in data:
        return packed
    again, numbers = io.BytesIO(), {id(part): number for number, part in enumerate(parts)}
    Packer(again, lambda part: numbers.get(id(part))).dump(packed.load(lambda part: part))
    return Packed(again.getvalue(), parts)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parts: Sequence[Any]) -> None:
        super().__init__(file)
        self._parts = parts

    def persistent_load(self, pid: Any) -> Any:  # Any: what Packer's aside returned
        return self._parts[pid]


def array_of(tensor: Tensor) -> Any:  # Any: numpy's array
    """Return a numpy array of its own, in the same order in memory."""
    return tensor.detach().cpu().numpy().copy(order="K")


# What blocks do to their arguments ----------------------------------------------------------------


def versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return how often each tensor was changed in place; 0 where torch does not count."""
    return tuple([0 if tensor.is_inference() else tensor._version for tensor in tensors])


def fingerprint(values: Any) -> bytes | None:  # Any: arguments of a block
    """Describe the content of arguments, tensors and classes by their identity; None for what cannot be pickled."""
    buffer = io.BytesIO()
    try:
        Packer(buffer, lambda part: ("same", id(part)) if isinstance(part, (Tensor, type)) else None).dump(values)
    except Exception:
        return None
    return buffer.getvalue()


class ArgumentGuard:
    """Notices when a block changes an argument: neither the other stages nor the driver would see the change.

    Args:
        template: What the block is called with.
        args: The positional arguments, filled.
        kwargs: The others.
        side_inputs: The tensors among them.
    """

    def __init__(
        self, template: Template, args: Sequence[Any], kwargs: dict[str, Any], side_inputs: Sequence[Tensor]
    ) -> None:
        self._template = template
        self._args = args
        self._kwargs = kwargs
        self._before = self._fingerprints()
        self._side_inputs = side_inputs
        self._versions = versions(side_inputs)

    def check(self, block: int, forward: Callable[..., Any]) -> None:
        """Raise when ``block``, which was just called, has changed an argument."""
        if versions(self._side_inputs) != self._versions:
            pairs = zip(self._side_inputs, self._versions, versions(self._side_inputs), strict=True)
            changed = {id(tensor) for tensor, before, now in pairs if before != now}
            holds = (p for p, v in self._values() if any(id(leaf) in changed for leaf in pytree.tree_leaves(v)))
            raise self._error(block, forward, next(holds, None), "in place")
        if self._before:
            after = self._fingerprints()
            for position, content in self._before.items():
                if after[position] != content:
                    raise self._error(block, forward, position, "(what it holds)")

    def _fingerprints(self) -> dict[int | str, bytes | None]:
        mutable = self._template.mutable
        return {p: fingerprint(value) for p, value in self._values() if p in mutable} if mutable else {}

    def _values(self) -> Iterator[tuple[int | str, Any]]:
        values: list[tuple[int | str, Any]] = [*enumerate(self._args), *self._kwargs.items()]
        return ((position, value) for position, value in values if position != self._template.hidden)

    def _error(self, block: int, forward: Callable[..., Any], position: int | str | None, how: str) -> SkipPipeError:
        name = "" if position is None else f" {self._template.name_of(position, forward)}"
        advice = ""
        if any(word in name for word in ("cache", "past")):
            advice = ". Of a model's cache: call the model with use_cache=False"
        return SkipPipeError(
            f"block {block} changes its argument{name} {how}, which neither the blocks on other workers nor the code "
            "after the blocks would see. If they are not meant to see it, let the block change a copy (x = x + y in "
            f"place of x += y); otherwise these blocks cannot be pipelined{advice}"
        )
