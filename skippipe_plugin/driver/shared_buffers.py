"""Buffers that several blocks share, or a block and the rest of the model: masks, rotary tables, random projections.

Such a buffer stays with the driver as it is, one object for all, and every block has a copy of it where it runs. What
user code writes into it goes to all of them before anything runs there; a block that writes it is refused, because the
other copies would not see that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..engine.attributes import have_equal_bits
from ..engine.control.values import Written
from ..engine.errors import SkipPipeError
from ..engine.wire import tensor_key, tensor_name


class Workers(Protocol):
    """Who have the copies."""

    def put(self, what: Written, tensors: Mapping[str, Tensor], *, absent: Collection[str] = ()) -> None:
        """Overwrite some."""


@dataclass(slots=True)
class _Shared:
    """A buffer that stays, and what the workers have of it."""

    tensor: Tensor
    copies: tuple[str, ...]
    """The names of its copies, ``"<block>\\t<name>"``."""
    label: str
    sent: Tensor
    version: int

    def is_written(self, *, thorough: bool) -> bool:
        """Whether it is another than the workers have; ``thorough`` sees writes past torch's count of them, too."""
        if not thorough and self.tensor._version == self.version:
            return False
        version = self.tensor._version
        if not have_equal_bits(self.tensor, self.sent):
            return True
        self.version = version
        return False


class SharedBuffers:
    """Those of one model."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._all: list[_Shared] = []
        self._label_of: dict[str, str] = {}
        """By the name of a copy."""

    def own(self, model: nn.Module, blocks: Mapping[int, nn.Module], names: Sequence[str]) -> frozenset[str]:
        """Find those of ``blocks``, which leave; return the names of their copies, ``"<block>\\t<name>"``."""
        for tensor, copies in _find(model, blocks):
            block, local = tensor_key(copies[0])
            label = f"{names[block]}.{local}"
            if tensor.is_meta:
                raise SkipPipeError(
                    f"{label} is also a buffer of other blocks or of the rest of the model, and has no values yet (the "
                    "meta device). Give each block a buffer of its own, or make this one with values: "
                    "register_buffer(name, torch.ones(..., device='cpu'))"
                )
            self._all.append(_Shared(tensor, copies, label, tensor.detach().clone(), tensor._version))
            self._label_of.update({name: f"{names[tensor_key(name)[0]]}.{tensor_key(name)[1]}" for name in copies})
        return frozenset(self._label_of)

    def clear(self) -> None:
        """Forget them: the blocks are here again."""
        self._all.clear()
        self._label_of.clear()

    def flush(self) -> None:
        """Send what user code has written."""
        for each in self._all:
            if each.is_written(thorough=True):
                self._workers.put("weights", dict.fromkeys(each.copies, each.tensor.detach()))
                each.sent, each.version = each.tensor.detach().clone(), each.tensor._version

    def written(self) -> str | None:
        """Name one that was written and that the workers do not have as it is now."""
        return next((each.label for each in self._all if each.is_written(thorough=False)), None)

    def check_kept(self, blocks: Sequence[int], written: Sequence[str]) -> None:
        """Raise when ``blocks``, of one kind, write one of theirs.

        Args:
            blocks: Their numbers.
            written: The buffers that such a block writes, by their names in it.
        """
        for name in (tensor_name(block, local) for local in written for block in blocks):
            if name in self._label_of:
                self._refuse(name)

    def check_alike(self, weights: Mapping[str, Tensor]) -> None:
        """Raise when a copy among ``weights`` is not what it was made of: its block has written it."""
        for each in self._all:
            for name in each.copies:
                if name in weights and not have_equal_bits(weights[name], each.sent):
                    self._refuse(name)

    def _refuse(self, name: str) -> None:
        raise SkipPipeError(
            f"the forward of a block writes {self._label_of[name]}, which is also a buffer of other blocks or of the "
            "rest of the model: they have copies of it on other machines, which would not see that. Give each block a "
            "buffer of its own (tensor.clone()), or write it outside of the blocks, between steps"
        )


def _find(model: nn.Module, blocks: Mapping[int, nn.Module]) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Yield each buffer with more than one owner, and the names of it in blocks; overlapping memory counts as one."""
    inside = [
        (buffer, tensor_name(block, local))
        for block, module in blocks.items()
        for local, buffer in module.named_buffers()
    ]
    outside = list(_buffers_outside(model, {id(module) for module in blocks.values()}))
    owners: dict[object, list[tuple[Tensor, int]]] = {}
    for buffer, name in inside:
        owners.setdefault(_memory(buffer), []).append((buffer, tensor_key(name)[0]))
    for buffer in outside:
        owners.setdefault(_memory(buffer), []).append((buffer, -1))
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for buffer, name in inside:
        others = (each for each, owner in owners[_memory(buffer)] if owner != tensor_key(name)[0])
        if any(each is buffer or _overlap(each, buffer) for each in others):
            found.setdefault(id(buffer), (buffer, []))[1].append(name)
    for tensor, names in found.values():
        yield tensor, tuple(names)


def _buffers_outside(model: nn.Module, blocks: Collection[int]) -> Iterator[Tensor]:
    seen, left = set(blocks), [model]
    while left:
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)
            left += [child for child in module._modules.values() if child is not None]


def _memory(tensor: Tensor) -> object:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    try:
        return ("memory", tensor.untyped_storage().data_ptr() or id(tensor))
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same storage have memory in common, gaps between their elements included."""
    (start, stop), (first, last) = _reach(one), _reach(other)
    return start < last and first < stop


def _reach(tensor: Tensor) -> tuple[int, int]:
    size, start = tensor.element_size(), int(tensor.storage_offset())
    if tensor.numel() == 0:
        return 0, 0
    length = 1 + sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + length) * size
