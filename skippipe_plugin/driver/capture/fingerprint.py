"""Names tensors of a device by content: they are read where they are, and only a few numbers come to the host.

What is summed are the words of a tensor, each times two random numbers, one for its row and one for its column, modulo
2^64. Two tensors of one form that differ have the same sum with a chance of about 2^-28, and the same two sums with one
of 2^-56.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from ...engine.device import HOST
from ...engine.memory_order import in_memory, order_of

_COLUMNS: Final = 1 << 10
_ROWS: Final = 1 << 10
_WORD: Final = 4
_CHUNK_BYTES: Final = _WORD * _ROWS * _COLUMNS
"""How much is read at once, which takes some five times the memory."""
_NUM_SUMS: Final = 2
_ODD: Final = 0x5851F42D4C957F2D
"""Tells the order of chunks."""


class Fingerprints:
    """Sums with random numbers of its own, which are the same in every process."""

    def __init__(self) -> None:
        self._factors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def of(self, tensors: Sequence[Tensor]) -> list[str]:
        """Return a name for each of some tensors of one device, which is waited for once."""
        if not tensors:
            return []
        with torch.no_grad():
            sums = torch.stack([self._sums(tensor.detach()) for tensor in tensors]).tolist()
        return [_name(tensor, each) for tensor, each in zip(tensors, sums, strict=True)]

    def _sums(self, tensor: Tensor) -> Tensor:
        """Return the sums of a tensor: [_NUM_SUMS]."""
        columns, rows = self._of_device(tensor.device)
        total = torch.zeros(_NUM_SUMS, dtype=torch.int64, device=tensor.device)
        dense = in_memory(tensor, order_of(tensor)).contiguous()
        for chunk in torch.split(dense.reshape(-1).view(torch.uint8), _CHUNK_BYTES):
            words = chunk.new_zeros(-(-len(chunk) // (_WORD * _COLUMNS)), _WORD * _COLUMNS)
            words.view(-1)[: len(chunk)] = chunk
            wide = words.view(torch.int32).to(torch.int64)
            by_row = torch.stack([(wide * column).sum(1) for column in columns])
            total = total * _ODD + (by_row * rows[:, : len(wide)]).sum(1)
        return total

    def _of_device(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._factors:
            generator = torch.Generator().manual_seed(0)
            shape = _NUM_SUMS, _COLUMNS + _ROWS
            drawn = torch.randint(-(1 << 63), (1 << 63) - 1, shape, generator=generator, device=HOST)
            columns, rows = torch.split(drawn.to(device), [_COLUMNS, _ROWS], 1)
            self._factors[device] = columns, rows
        return self._factors[device]


def _name(tensor: Tensor, sums: Sequence[int]) -> str:
    form = f"{tensor.dtype}{list(tensor.shape)}{order_of(tensor)}{sums}"
    return hashlib.blake2b(form.encode(), digest_size=16).hexdigest()
