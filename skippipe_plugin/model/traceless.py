"""Run user code for a look at what comes out of it, and leave no trace: attributes, buffers, metrics, random states.

Global names that the code reads are brought back, too, and what stands in its classes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
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


@contextmanager
def untouched(module: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """Bring everything back at the end, and whenever the function that this gives is called."""
    states, rewind, attributes = RandomStates(device), rewinder(module), _Attributes()
    outer = OuterState(module)
    for part in module.modules():
        attributes.note(part.__dict__, 0)
    for value in outer.values():
        attributes.note(value, 1)

    def restore() -> None:
        outer.rebind()
        attributes.restore()
        rewind()
        for part, counts in metrics:
            part.__dict__["_update_count"] = counts
        states.set()

    metrics = [(part, part._update_count) for part in module.modules() if isinstance(part, Metric)]
    try:
        yield restore
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

    def restore(self) -> None:
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def note(self, value: Any, depth: int) -> None:
        """Remember what ``value`` holds."""
        if type(value) in _PLAIN or id(value) in self._seen or depth > _DEPTH:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, np.ndarray):
            if value.size <= _COPIED_ELEMENTS and value.flags.writeable:
                copy = value.copy()
                self._undo.append(lambda: np.copyto(value, copy))
        elif isinstance(value, (dict, list, set, deque)):
            self._note_container(value, depth)
        elif (undo := generator_undo(value)) is not None:
            self._undo.append(undo)
        elif not isinstance(value, nn.Module) and _is_plain_object(value):
            self.note(value.__dict__, depth + 1)

    def _note_tensor(self, value: Tensor) -> None:
        if isinstance(value, nn.Parameter) or value.is_meta or value.numel() > _COPIED_ELEMENTS or value.requires_grad:
            return
        if type(value) is Tensor and value.layout == torch.strided:
            copy = value.clone()
            self._undo.append(lambda: None if torch.equal(value, copy) else _put(value, copy))

    def _note_container(self, value: Any, depth: int) -> None:
        copy = value.copy()

        def undo() -> None:
            if isinstance(value, dict):
                if value.keys() != copy.keys() or any(value[key] is not item for key, item in copy.items()):
                    value.clear()
                    value.update(copy)
            elif isinstance(value, set):
                value.clear()
                value.update(copy)
            elif len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=True)):
                value.clear()
                value.extend(copy)

        self._undo.append(undo)
        for key, item in list(copy.items() if isinstance(copy, dict) else enumerate(copy)):
            if key not in ("_trainer", "_fabric", "_parameters", "_modules"):
                self.note(item, depth + 1)


_PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, type, tuple, torch.dtype, torch.device})


def _put(value: Tensor, copy: Tensor) -> None:
    value.data.copy_(copy)


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    return hasattr(value, "__dict__") and not callable(value) and not kind.__module__.startswith(_OTHERS)
