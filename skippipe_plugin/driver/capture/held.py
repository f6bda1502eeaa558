"""All that a step's code may change on the driver, noted as deep as it is usual to keep things, and brought back.

That is what its module holds in attributes, buffers and parameters; what its classes, the functions around them and the
global names that they read hold; and what else the caller knows to be in reach.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from . import copies
from .copies import Copied, joined
from .iterators import Place, Replayed, is_opaque, watched
from .outer_state import code_of, entries, is_users
from .remote import Source, is_remote, slot_of

_DEPTH: Final = 4
"""How deep containers and objects are looked into."""
_MOST_ITEMS: Final = 1024
"""Of larger containers only these are looked into; what they hold is noted in any case."""
_MOST_LOOKED_AT: Final = 50_000
_OTHERS: Final = frozenset(
    (
        *("torch", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "skippipe_plugin", "peft"),
        *("threading", "concurrent", "queue", "logging", "asyncio", "multiprocessing", "contextlib", "io", "weakref"),
    )
)
"""Objects of these packages are not looked into."""
_APART: Final = frozenset({"_trainer", "_fabric"})
"""What is no value of a module's."""
_ENTRIES: Final = ("_parameters", "_modules")
"""What modules keep apart, by the names of their attributes: code may put others there for a while."""
_OURS: Final = "_skippipe_"
"""So begin attributes of the user's objects that hold something of ours."""
_PLAIN: Final = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})


_BARE_CONTAINERS: Final = frozenset({dict, list, set, deque, OrderedDict, defaultdict})


class _Bare(Metric):
    def update(self) -> None: ...

    def compute(self) -> None: ...


_METRICS: Final = frozenset(vars(_Bare()))
"""What torchmetrics keeps in a metric."""


class Held:
    """What a module's code finds, as it is now.

    Args:
        module: Whose code it is, its parts included.
        others: By name, what else it can reach.
        most_copied: So many elements of large tensors are copied. Of others is only known whether they were written to.
    """

    def __init__(self, module: nn.Module, others: Mapping[str, Any], most_copied: int = 1 << 26) -> None:
        self._seen: dict[int, Any] = {}
        self._copies: list[Copied] = []
        self._empty: list[tuple[str, dict[Any, Any]]] = []
        """By the name of what would be in them: dictionaries that torch keeps in modules and that hold nothing."""
        self._places: list[Place] = []
        self._seen_kinds: set[int] = set()
        self._names: set[tuple[int, str]] = set()
        self._waiting: deque[tuple[Any, int, str]] = deque()
        self._left_to_copy = most_copied
        self._standing_in: dict[int, Replayed] = {}
        self._note_module(module, 0, "self", is_own=True)
        self._wait(others.items(), -1)
        while self._waiting and len(self._seen) < _MOST_LOOKED_AT:
            self._note(*self._waiting.popleft())

    def restore(self) -> None:
        """Bring everything back."""
        with torch.no_grad():
            for place in self._places:
                place.rewind()
            for each in self._copies:
                each.restore()
            for _, own in self._empty:
                if own:
                    own.clear()

    def changes(self) -> dict[str, Any]:
        """Return by name what is another than it was; what is gone is None."""
        found: dict[str, Any] = {}
        for each in self._copies:
            if each.name:
                found.update(each.changes())
        for name, own in self._empty:
            if own and name:
                found |= {joined(name, key): copies.kept(item) for key, item in own.items()}
        return found | {place.name: num for place in self._places if (num := place.num_taken())}

    def release(self) -> None:
        """Put iterators back that nobody has taken from."""
        for place in self._places:
            place.release(self)

    # ------------------------------------------------------------ looking

    def _wait(self, items: Iterable[tuple[str, Any]], depth: int) -> None:
        """Look at what is in something at ``depth`` later: what is nearer comes first."""
        if depth < _DEPTH:
            self._waiting.extend((item, depth + 1, name) for name, item in items)

    def _items(self, value: Any, name: str) -> Iterator[tuple[str, Any]]:
        """Return what is left to look into in a container, by name; buffers are called like attributes."""
        seen = self._seen
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return (
            (name if key == "_buffers" else joined(name, key), item)
            for key, item in itertools.islice(items, _MOST_ITEMS)
            if type(item) not in _PLAIN and id(item) not in seen and not (type(key) is str and key.startswith(_OURS))
        )

    def _note(self, value: Any, depth: int, name: str) -> None:
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(value, name)
        elif isinstance(value, np.ndarray):
            if value.size <= copies.LARGE and value.flags.writeable:
                self._copies.append(copies.CopiedArray(name, value, value.copy()))
        elif isinstance(value, nn.Module):
            self._note_module(value, depth, name)
        elif isinstance(value, copies.CONTAINERS):
            self._note_container(value, depth, name)
            if type(value) not in _BARE_CONTAINERS:
                self._note_object(value, depth, name)
        elif isinstance(value, tuple):
            self._wait(self._items(value, name), depth)
        elif isinstance(value, type):
            self._note_class(value, depth)
        elif isinstance(value, types.FunctionType):
            self._note_function(value, depth)
        elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
            self._wait([(name, value.__self__)], depth - 1)
        elif (generator := copies.generator_copy(name, value)) is not None:
            self._copies.append(generator)
        else:
            self._note_object(value, depth, name)

    def _note_tensor(self, value: Tensor, name: str) -> None:
        if is_remote(value):
            self._note_source(slot_of(value).source)
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.layout != torch.strided:
            return
        is_large = value.numel() > copies.LARGE
        fits = not is_large or value.numel() <= self._left_to_copy
        self._left_to_copy -= value.numel() if is_large and fits else 0
        self._copies.append(copies.tensor_copy(name, value, is_copied=fits))
        if value.is_leaf and value.requires_grad:
            self._copies.append(copies.CopiedHooks.of(name, value))

    def _note_source(self, source: Source) -> None:
        """Note the tensors that have their values on workers, which code may write, too."""
        if id(source) not in self._seen:
            self._seen[id(source)] = source
            self._copies.append(source.noted())

    def _note_container(
        self, value: Any, depth: int, name: str, hidden: frozenset[str] = frozenset(), *, watches: bool = True
    ) -> None:
        if watches and not isinstance(value, set) and depth < _DEPTH:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            for key in keys[:_MOST_ITEMS]:
                if type(item := value[key]) not in _PLAIN and hasattr(type(item), "__next__"):
                    self._watch(item, joined(name, key), functools.partial(_put_item, value, key))
        copy = copies.container_copy(name, value, hidden)
        self._copies.append(copy)
        self._wait(self._items(copy.copy, name), depth)

    def _note_names(
        self, name: str, read: Callable[[], dict[str, Any]], write: Callable[[str, Any], object], erase: Any, depth: int
    ) -> None:
        for key, item in read().items():
            self._watch(item, joined(name, key), functools.partial(_put_name, read, write, key))
        copy = read()
        self._copies.append(copies.CopiedNames(name, read, write, erase, copy))
        self._wait(self._items(copy, name), depth)

    def _watch(self, item: Any, name: str, put: Callable[[Any, Any], None]) -> None:
        """Let an iterator keep what it gives."""
        if is_opaque(item):
            iterator = self._standing_in.setdefault(id(item), Replayed(item))
            iterator.stand_in(put)
            item = iterator
        if isinstance(item, Replayed) and id(item) not in self._seen:
            self._seen[id(item)] = item
            self._places.append(watched(item, self, name))

    def _note_module(self, module: nn.Module, depth: int, name: str, *, is_own: bool = False) -> None:
        """Look at all parts of a module; where it is a hidden one, what its metrics count is a value as any other."""
        away = ""  # where the last block is that is on a worker: its iterators are there
        for path, part in list(module.named_modules()):
            if "_skippipe_call" in part.__dict__:
                away = path
            if part is module or id(part) not in self._seen:
                self._seen[id(part)] = part
                is_here = not away or not f"{path}.".startswith(f"{away}.")
                self._note_part(part, depth, f"{name}.{path}".rstrip("."), is_own=is_own, is_here=is_here)

    def _note_part(self, part: nn.Module, depth: int, name: str, *, is_own: bool, is_here: bool) -> None:
        hidden: frozenset[str] = frozenset()
        if isinstance(part, Metric):
            hidden = _METRICS | part._defaults.keys() if is_own else _METRICS
        if is_own and type(part).__module__.startswith("torchmetrics"):
            name = ""
        attributes = part.__dict__
        for each in (attributes, *(attributes[key] for key in _APART & attributes.keys())):
            self._seen[id(each)] = each
        for key in _ENTRIES:
            self._note_entries(attributes[key], name)
        for key in copies.TORCHS & attributes.keys():  # most are empty: of hooks, buffers
            if isinstance(hooks := attributes[key], dict) and not hooks and id(hooks) not in self._seen:
                self._seen[id(hooks)] = hooks
                self._empty.append((joined(name, key), hooks))
        self._note_container(attributes, depth, name, hidden, watches=is_here)
        for key, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in self._seen:
                self._seen[id(parameter)] = parameter
                self._note_tensor(parameter, joined(name, key))
                self._copies.append(copies.CopiedFlag.of(joined(name, key), parameter))
        self._note_classes(part, depth)

    def _note_entries(self, own: dict[str, Any], name: str) -> None:
        """Note which parameters or modules stand in a module; what they are is noted of each."""
        self._seen[id(own)] = own
        if own:
            self._copies.append(copies.container_copy(name, own, frozenset()))
        else:
            self._empty.append((name, own))

    def _note_object(self, value: Any, depth: int, name: str) -> None:
        kind = type(value)
        if isinstance(value, (Optimizer, LRScheduler)):
            self._seen[id(getattr(value, "state", value))] = value
        elif isinstance(value, types.ModuleType) or str(kind.__module__).partition(".")[0] in _OTHERS:
            return
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and id(attributes) not in self._seen:
            self._seen[id(attributes)] = attributes
            self._note_container(attributes, depth, name)
        if slots := _slots(kind):
            read = functools.partial(_read_slots, value, slots)
            write, erase = functools.partial(object.__setattr__, value), functools.partial(object.__delattr__, value)
            self._note_names(name, read, write, erase, depth)
        if isinstance(value, functools.partial):
            self._wait([(name, value.func), (name, value.args), (name, value.keywords)], depth)
        self._note_classes(value, depth)

    def _note_classes(self, value: Any, depth: int) -> None:
        kind = type(value)
        if id(kind) not in self._seen_kinds:
            self._seen_kinds.add(id(kind))
            self._wait(((cls.__name__, cls) for cls in kind.__mro__ if is_users(cls.__module__)), depth)

    def _note_class(self, cls: type, depth: int) -> None:
        if not is_users(cls.__module__):
            return
        read, erase = functools.partial(entries, cls), functools.partial(delattr, cls)
        self._note_names(cls.__name__, read, functools.partial(setattr, cls), erase, depth)
        self._wait(((base.__name__, base) for base in cls.__bases__), depth)
        self._note_code(cls, depth)

    def _note_function(self, function: types.FunctionType, depth: int) -> None:
        if not is_users(function.__module__):
            return
        name, variables = function.__name__, function.__code__.co_freevars
        self._note_container(function.__dict__, depth, name)
        cells = dict(zip(variables, function.__closure__ or (), strict=True))
        read, write = functools.partial(_read_cells, cells), functools.partial(_write_cell, cells)
        self._note_names(name, read, write, functools.partial(_empty_cell, cells), depth)
        self._wait(self._items(function.__defaults__ or (), name), depth)
        self._wait(self._items(function.__kwdefaults__ or {}, name), depth)
        self._note_code(function, depth)

    def _note_code(self, owner: type | types.FunctionType, depth: int) -> None:
        code = code_of(owner)
        self._wait(((each.__name__, each) for each in code.functions), depth - 1)
        for each in code.names:
            if (key := (id(each.namespace), each.name)) not in self._names:
                self._names.add(key)
                self._watch(each.value(), each.name, functools.partial(_put_item, each.namespace, each.name))
                self._copies.append(copies.CopiedName(each.name, each, each.value()))
                self._wait([(each.name, each.value())], depth - 1)


_SLOTS: Final[weakref.WeakKeyDictionary[type, tuple[str, ...]]] = weakref.WeakKeyDictionary()


def _put_item(container: Any, key: Any, old: Any, new: Any) -> None:
    """Let ``new`` stand where ``old`` does, if it still does."""
    try:
        if container[key] is old:
            container[key] = new
    except (KeyError, IndexError):
        return


def _put_name(
    read: Callable[[], dict[str, Any]], write: Callable[[str, Any], object], key: str, old: Any, new: Any
) -> None:
    if read().get(key) is old:
        write(key, new)


def _slots(kind: type) -> tuple[str, ...]:
    if kind not in _SLOTS:
        classes = [cls for cls in kind.__mro__ if "__slots__" in vars(cls) and str(cls.__module__) != "builtins"]
        slots = (n for cls in classes for n, v in vars(cls).items() if isinstance(v, types.MemberDescriptorType))
        _SLOTS[kind] = tuple(slots)
    return _SLOTS[kind]


def _read_slots(value: Any, slots: Iterable[str]) -> dict[str, Any]:
    missing = object()
    found = {name: getattr(value, name, missing) for name in slots}
    return {name: item for name, item in found.items() if item is not missing}


def _read_cells(cells: Mapping[str, types.CellType]) -> dict[str, Any]:
    found = {}
    for name, cell in cells.items():
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    return found


def _write_cell(cells: Mapping[str, types.CellType], name: str, value: Any) -> None:
    cells[name].cell_contents = value


def _empty_cell(cells: Mapping[str, types.CellType], name: str) -> None:
    del cells[name].cell_contents
