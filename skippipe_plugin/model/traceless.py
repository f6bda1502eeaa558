"""Run user code for a look at what comes out of it, and leave no trace: attributes, buffers, metrics, random states.

Global names that the code reads are brought back, too, and what stands in its classes. What a run has changed of them
can be read before.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from ..driver.capture.outer_state import OuterState, generator_undo
from ..driver.capture.randomness import random_states, set_random_states
from ..driver.capture.rewind import rewinder

_DEPTH: Final = 4
"""How deep containers and objects in attributes are looked into."""
_UNEVEN: Final = 0.1
_LOOKED_AT: Final = 64
_COPIED_ELEMENTS: Final = 1 << 20
"""Larger tensors in attributes are not copied: what is counted or kept between steps is small."""
_OTHERS: Final = (
    *("torch.", "lightning", "pytorch_lightning", "transformers", "torchmetrics", "skippipe_plugin", "peft"),
    *("threading", "concurrent.", "queue", "logging", "asyncio", "multiprocessing"),
)
"""Objects of these packages are not looked into."""


class RandomStates:
    """The random states of torch, numpy and Python, as they are now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch = random_states(device)
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def set(self) -> None:
        """Put them back."""
        set_random_states(self._device, self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def are_drawn_from(self) -> bool:
        """Whether somebody has drawn by numpy's or Python's global functions since."""
        before: Any = self._numpy  # Any: numpy's own
        now: Any = np.random.get_state()
        return random.getstate() != self._python or not np.array_equal(before[1], now[1]) or before[2] != now[2]


@dataclass(frozen=True, slots=True)
class Untouched:
    """What user code finds when it runs for a look."""

    restore: Callable[[], None]
    """Brings everything back."""
    changes: Callable[[], dict[str, Any]]
    """Returns, by name, what attributes, buffers and global names hold since then that they did not hold before."""
    has_drawn: Callable[[], bool]
    """Returns whether numbers were drawn since then that numpy or Python makes; torch's are looked at one by one."""


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[Untouched]:
    """Bring everything back at the end, and whenever what this gives is asked to."""
    states, rewind, attributes = RandomStates(device), rewinder(module), _Attributes()
    outer = OuterState(module)
    for name, part in module.named_modules():
        attributes.note(part.__dict__, 0, f"self.{name}".rstrip(".") if not _counts_apart(part) else "")
    for name, value in outer.values():
        attributes.note(value, 1, name)

    def restore() -> None:
        outer.rebind()
        attributes.restore()
        rewind()
        for part, counts in metrics:
            part.__dict__["_update_count"] = counts
        states.set()

    def changes() -> dict[str, Any]:
        return attributes.changes() | {name: _kept(value) for name, value in outer.changes()}

    metrics = [(part, part._update_count) for part in module.modules() if isinstance(part, Metric)]
    try:
        yield Untouched(restore, changes, states.are_drawn_from)
    finally:
        restore()


@contextmanager
def uneven(module: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let no parameter of ``module`` have one value everywhere, those of ``blocks`` aside; bring all back at the end.

    A head that starts as zeros says of every label the same, so that any mean of the losses is like any other.
    """
    elsewhere = {id(parameter) for block in blocks for parameter in block.parameters()}
    noise, even = torch.Generator().manual_seed(0), []
    for parameter in module.parameters():
        if id(parameter) not in elsewhere and _is_even(parameter):
            even.append((parameter, parameter.detach().reshape(-1)[0].item()))
            drawn = torch.rand(parameter.shape, generator=noise, dtype=torch.float32) * _UNEVEN
            parameter.data.add_(drawn.to(parameter))
    try:
        yield
    finally:
        for parameter, value in even:
            parameter.data.fill_(value)


def _is_even(parameter: nn.Parameter) -> bool:
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.is_floating_point():
        return False
    values = parameter.detach()
    if values.layout is not torch.strided or values.numel() < 2:
        return False
    first = values.reshape(-1)[:_LOOKED_AT]
    return bool((first == first[0]).all()) and bool((values == first[0]).all())


class _Attributes:
    """Shallow copies of containers, made before they may change."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._undo: list[Callable[[], object]] = []
        self._noted: list[tuple[str, Any, Any]] = []
        """Name, container or tensor, copy."""

    def restore(self) -> None:
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def note(self, value: Any, depth: int, name: str = "") -> None:
        """Remember what ``value`` holds; where it has a name, :meth:`changes` tells what has changed."""
        if type(value) in _PLAIN or id(value) in self._seen or depth > _DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(value, name)
        elif isinstance(value, np.ndarray):
            if value.size <= _COPIED_ELEMENTS and value.flags.writeable:
                copy = value.copy()
                self._undo.append(lambda: np.copyto(value, copy))
                self._noted.append((name, value, copy))
        elif isinstance(value, (dict, list, set, deque)):
            self._note_container(value, depth, name)
        elif (undo := generator_undo(value)) is not None:
            self._undo.append(undo)
        elif not isinstance(value, nn.Module) and _is_plain_object(value):
            self.note(value.__dict__, depth + 1, name)

    def changes(self) -> dict[str, Any]:
        """Return by name what is another than it was; what is gone is None."""
        found: dict[str, Any] = {}
        for name, value, copy in self._noted:
            if not name:
                continue
            if isinstance(value, Tensor):
                if not torch.equal(value, copy):
                    found[name] = value.clone()
            elif isinstance(value, np.ndarray):
                if not np.array_equal(value, copy):
                    found[name] = value.copy()
            elif isinstance(value, dict):
                known = _TORCHS if copy.keys() >= _TORCHS else ()  # a module's own; a user's may have the same keys
                new = {key: item for key, item in value.items() if copy.get(key, found) is not item}
                gone = dict.fromkeys(key for key in copy if key not in value)
                others = {key: item for key, item in (new | gone).items() if key not in known}
                found |= {_joined(name, key): _kept(item) for key, item in others.items()}
            elif isinstance(value, set):
                if value != copy:
                    found[name] = len(value)
            elif _has_others(value, copy):
                found[name] = [_kept(item) for item in value]
        return found

    def _note_tensor(self, value: Tensor, name: str) -> None:
        if isinstance(value, nn.Parameter) or value.is_meta or value.numel() > _COPIED_ELEMENTS or value.requires_grad:
            return
        if type(value) is Tensor and value.layout == torch.strided:
            copy = value.clone()
            self._undo.append(lambda: None if torch.equal(value, copy) else _put(value, copy))
            self._noted.append((name, value, copy))

    def _note_container(self, value: Any, depth: int, name: str) -> None:
        copy = value.copy()

        def undo() -> None:
            if isinstance(value, dict):
                if value.keys() != copy.keys() or any(value[key] is not item for key, item in copy.items()):
                    value.clear()
                    value.update(copy)
            elif isinstance(value, set):
                value.clear()
                value.update(copy)
            elif _has_others(value, copy):
                value.clear()
                value.extend(copy)

        self._undo.append(undo)
        self._noted.append((name, value, copy))
        for key, item in list(copy.items() if isinstance(copy, dict) else enumerate(copy)):
            if key not in ("_trainer", "_fabric", "_parameters", "_modules"):
                self.note(item, depth + 1, name and (name if key == "_buffers" else _joined(name, key)))


_TORCHS: Final = frozenset(vars(nn.Module()))
"""What torch keeps in a module."""


def _has_others(value: Sequence[Any], copy: Sequence[Any]) -> bool:
    """Whether a list holds other objects than its copy."""
    return len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=True))


def _joined(name: str, key: Any) -> str:
    return f"{name}.{key}" if isinstance(key, str) and key.isidentifier() else f"{name}[{key!r}]"


def _kept(value: Any) -> Any:
    """Return ``value`` as it is now, whatever becomes of the tensors in it; nothing is said of those elsewhere."""

    def kept(tensor: Tensor) -> Any:
        return tensor.detach().clone() if type(tensor) is Tensor and not tensor.is_meta else type(tensor)

    return pytree.tree_map_only(Tensor, kept, value)


def _counts_apart(part: nn.Module) -> bool:
    """Whether a module is one of torchmetrics, whose counts are looked at in their own way."""
    return type(part).__module__.startswith("torchmetrics") or isinstance(part, Metric)


_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, type, tuple, torch.dtype, torch.device})


def _put(value: Tensor, copy: Tensor) -> None:
    value.data.copy_(copy)


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    return hasattr(value, "__dict__") and not callable(value) and not kind.__module__.startswith(_OTHERS)
