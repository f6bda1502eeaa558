"""What a step that is only asked has done to its batch, and how that is taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..driver.capture.contents import undo_changes
from ..driver.capture.copies import CopiedFlag
from .counting import View, tensors


class BatchState:
    """A batch and its microbatches, as they are now.

    Args:
        view: Holds them.
    """

    def __init__(self, view: View) -> None:
        self._batch = view.batch
        self._undo = undo_changes([view.batch, *view.pieces])
        held = [each for of in (view.batch, *view.pieces) for each in tensors(of, "batch")]
        self._flags = [CopiedFlag.of(path, leaf) for path, leaf in held]
        self._copies = {path: (leaf.detach().clone(), leaf.requires_grad) for path, leaf in _plain(view.batch)}
        self._keys = _keys(view.batch)

    def restore(self) -> None:
        """Bring all back, whatever was put into it, taken out or written, or made to require a gradient."""
        self._undo()
        for flag in self._flags:
            flag.restore()

    def changed(self) -> str:
        """Name what is another in the batch than it was; nothing where it is as it was."""
        for path, leaf in _plain(self._batch):
            before, required_grad = self._copies.get(path, (None, False))
            if before is None or not _equal(leaf, before) or leaf.requires_grad != required_grad:
                return path
        return "the batch" if _keys(self._batch) != self._keys else ""


def _plain(batch: Any) -> list[tuple[str, Tensor]]:
    return [
        (path, leaf)
        for path, leaf in tensors(batch, "batch")
        if leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_meta
    ]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _keys(value: Any) -> tuple[Any, ...]:
    """Return what is in a batch, by kinds and names: what is taken out or put in shows."""
    held = value if isinstance(value, (dict, list, tuple)) else getattr(value, "__dict__", None)
    if isinstance(value, Tensor) or held is None:
        return (type(value).__name__,)
    items = held.items() if isinstance(held, dict) else enumerate(held)
    return tuple((key, _keys(item)) for key, item in items)
