"""What each block does to the form of its input, learned once from the blocks themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import nn

from ...engine.stage import Probe
from ...engine.taps import own_hooks
from ...engine.transport import TensorSpec

_Signature = tuple[object, ...]
Mode = tuple[bool, bool]
"""Whether gradients are on, and whether the block is in training."""


class ShapeBook:
    """Knows output specs and return structures; asks ``probe`` about what it does not know.

    Blocks of the same classes with the same settings and parameters of the same shapes behave alike, in the same mode:
    with gradients or without, in training or not. A kind of block that once kept the form of its input is taken to keep
    every form; the worker checks that at every call.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        kinds: dict[_Signature, int] = {}
        self._kinds = [kinds.setdefault(_signature(block), len(kinds)) for block in blocks]
        self._keeping: dict[tuple[int, Mode], Probe] = {}
        self._known: dict[tuple[int, Mode, TensorSpec], Probe] = {}
        self._last: list[tuple[Mode, TensorSpec, Probe] | None] = [None] * len(self._kinds)
        """By block: a question that has a lasting answer, and that answer: mostly the next question is the same."""

    def is_settled(self, modes: Sequence[Mode]) -> bool:
        """Whether every block is known to keep the form of its input, so that nothing need be asked any more."""
        return all(each in self._keeping for each in zip(self._kinds, modes, strict=True))

    def alike(self, block: int) -> list[int]:
        """Return the blocks of the same kind."""
        return [index for index, each in enumerate(self._kinds) if each == self._kinds[block]]

    def output(self, block: int, enters: TensorSpec, mode: Mode, probe: Callable[[], Probe], *, ask: bool) -> Probe:
        """Return what ``block`` makes of a tensor of spec ``enters``.

        With ``ask`` each mode is asked about, without it only what is known in none.
        """
        last = self._last[block]
        if last is not None and last[0] == mode and (last[1] is enters or last[1] == enters):
            return last[2]
        kind = self._kinds[block]
        other: Mode = (not mode[0], mode[1])
        for each in (mode, other, (mode[0], not mode[1]), (other[0], not mode[1])):
            found = self._known.get((kind, each, enters))
            if (kind, each) in self._keeping:
                found = dataclasses.replace(self._keeping[kind, each], output=enters)
            if found is not None:
                self._last[block] = (mode, enters, found) if each == mode else None
                return found
            if ask:
                break
        found = self._known[kind, mode, enters] = probe()
        if found.output == enters:
            self._keeping[kind, mode] = found
        return found


def _signature(block: nn.Module) -> _Signature:
    shapes = tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in block.named_parameters())
    parts = tuple((name, type(part), part.extra_repr(), _settings(part)) for name, part in block.named_modules())
    return (shapes, parts, tuple(own_hooks(block)))


_PLAIN: Final = (type(None), bool, int, float, str, torch.dtype, torch.Size)


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Return the plain attributes of a module, by which blocks of one class may differ in what they do."""
    held = [(name, value) for name, value in vars(module).items() if not name.startswith("_") and name != "training"]
    return tuple((name, repr(value)) for name, value in held if _is_plain(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
