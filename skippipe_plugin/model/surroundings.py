"""What a step may look at beside its batch, and whether that is as it was: flags, numbers and parts of modules.

A step that was asked once does something else when a callback has set a flag, or when a criterion was replaced in the
third epoch. So what the driver's modules hold is looked at once per step, and steps are asked anew where it is new.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection, Hashable, Iterable
from typing import Any, Final

from torch import Tensor, nn
from torchmetrics import Metric

from ..driver.capture.copies import TORCHS

_EXACT: Final = frozenset({bool, int, str, types.NoneType})
_RESTLESS: Final = 8
"""What has had so many values is taken for a counter or the like: it says nothing."""
_FEW: Final = 16
"""Containers with more entries are known by their length."""
_SMALL: Final = 4096
"""Changes in larger tensors are taken for what changes all the time."""
_LOOKED_AT: Final = frozenset({"training", "_modules", "_buffers"})
"""Of what torch keeps in a module."""


class Surroundings:
    """Numbers what the modules on the driver hold.

    Args:
        module: The whole model.
        blocks: Those of its parts that are looked at elsewhere.
        ignored: Names of attributes that are a framework's own.
    """

    def __init__(self, module: nn.Module, blocks: Iterable[nn.Module], ignored: Collection[str] = ()) -> None:
        self._module = module
        self._elsewhere = {id(block) for block in blocks}
        self._ignored = (TORCHS | frozenset(ignored)) - _LOOKED_AT
        self._holders: list[dict[str, Any]] = []
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._num_names = -1
        self._seen: dict[tuple[int, str], set[Hashable]] = {}
        """By holder and name: the values it has had."""
        self._now: list[Hashable] = []
        self._numbers: dict[tuple[Hashable, ...], int] = {}
        self._number = 0

    def number(self) -> int:
        """Return the same number as ever when things are as they were then, and a new one when they never were so."""
        if self._num_names != sum(map(len, self._holders)):
            self._list()
        now = self._tokens()
        if now != self._now:
            self._change(now)
        return self._number

    def _tokens(self) -> list[Hashable]:
        held = [holder.get(name) for holder, name in self._slots]
        return [value if type(value) in _EXACT else _token(value) for value in held]

    def _list(self) -> None:
        """List what is looked at."""
        parts: dict[int, nn.Module] = {}
        self._walk(self._module, parts)
        self._holders = [holder for part in parts.values() for holder in (part.__dict__, part._buffers)]
        self._num_names = sum(map(len, self._holders))
        self._slots = [
            (holder, name)
            for holder in self._holders
            for name in holder
            if name not in self._ignored and len(self._seen.get((id(holder), name), ())) < _RESTLESS
        ]
        self._now = []

    def _walk(self, part: nn.Module, found: dict[int, nn.Module]) -> None:
        if id(part) in found or id(part) in self._elsewhere or isinstance(part, Metric):
            return
        found[id(part)] = part
        for child in part.children():
            self._walk(child, found)

    def _change(self, now: list[Hashable]) -> None:
        calm, same_parts = True, len(now) == len(self._now)
        for at, ((holder, name), token) in enumerate(zip(self._slots, now, strict=True)):
            seen = self._seen.setdefault((id(holder), name), set())
            seen.add(token)
            calm &= len(seen) < _RESTLESS
            same_parts &= name != "_modules" or not self._now or self._now[at] == token
        if not calm or not same_parts:
            self._list()
            now = self._tokens()
        self._now = now
        key = tuple((id(holder), name, token) for (holder, name), token in zip(self._slots, now, strict=True))
        self._number = self._numbers.setdefault(key, len(self._numbers))


def _token(value: Any) -> Hashable:
    kind = type(value)
    if kind in _EXACT:
        return value  # type: ignore[no-any-return]
    if isinstance(value, (dict, list, tuple)):
        items = value.values() if isinstance(value, dict) else value
        return tuple(map(_leaf, items)) if len(value) <= _FEW else len(value)
    is_plain = kind is not float and _is_plain(kind)  # type: ignore[arg-type] # classes are hashable
    if is_plain and len(held := vars(value)) <= _FEW:
        return tuple(map(_leaf, held.values()))
    return _leaf(value)


def _leaf(value: Any) -> Hashable:
    kind = type(value)
    if kind in _EXACT:
        return value  # type: ignore[no-any-return]
    if kind is float:
        return "nan" if value != value else (value > 0) - (value < 0)
    if isinstance(value, Tensor) and value.numel() <= _SMALL:
        return id(value), -1 if value.is_inference() else value._version
    return id(value)


@functools.cache
def _is_plain(kind: type) -> bool:
    """Whether objects of a kind hold settings of the user's, as a dataclass does."""
    others = ("torch", "lightning", "pytorch_lightning", "transformers", "peft", "skippipe_plugin", "numpy")
    is_theirs = issubclass(kind, nn.Module | Tensor) or kind.__module__.partition(".")[0] in others
    return bool(kind.__dictoffset__) and not is_theirs
