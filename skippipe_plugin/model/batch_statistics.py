"""BatchNorms inside of the blocks: they see microbatches, which is said once, and cannot do with a single sample."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

log = logging.getLogger(__name__)

_ALONE: Final = "of {total} samples some have one, on which a BatchNorm inside of the blocks ({name}) cannot train"
_SEES: Final = (
    "BatchNorm inside of the blocks (%s) takes its statistics from microbatches of %s samples, as under gradient "
    "accumulation, where one process takes them from all %d%s. microbatches='stack' or num_microbatches=1 gives it the "
    "batch, but then one stage works at a time"
)


class BatchStatistics:
    """The BatchNorms of one model's blocks.

    Args:
        names: The blocks' names.
        blocks: The blocks.
    """

    def __init__(self, names: Sequence[str], blocks: Sequence[nn.Module]) -> None:
        parts = [
            (f"{name}.{inner}" if inner else name, part)
            for name, block in zip(names, blocks, strict=True)
            for inner, part in block.named_modules()
        ]
        self._norms = [(name, part) for name, part in parts if isinstance(part, _BatchNorm)]
        self._is_told = False

    def alone(self, sizes: Sequence[int]) -> str:
        """Say what cannot do with microbatches of these sizes; nothing when all can."""
        name = self._first() if min(sizes) == 1 else ""
        return _ALONE.format(name=name, total=sum(sizes)) if name else ""

    def tell(self, sizes: Sequence[int], drivers: int) -> None:
        """Say once that microbatches are what they see; each of several drivers has a batch of its own."""
        if not self._is_told and (name := self._first()):
            self._is_told = True
            span = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{max(sizes)}"
            others = " and those of the other drivers" if drivers > 1 else ""
            log.warning(_SEES, name, span, sum(sizes), others)

    def _first(self) -> str:
        """Name the first that looks at its batch."""
        looking = (name for name, part in self._norms if part.training or part.running_mean is None)
        return next(looking, "")
