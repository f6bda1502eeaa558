"""Buffers of blocks, as they were when a training step began: a step that is given up has not counted its samples.

BatchNorm counts what it sees as it sees it. A step that is repeated after a loss would be counted twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@dataclass(slots=True)
class _Noted:
    """A buffer, and a copy of it as of one of its versions."""

    owner: dict[str, Any]  # Any: torch's own table of a module's buffers
    name: str
    quietly: bool
    """Whether it may change without that being seen in its version, as torch's own batch norm does it."""
    tensor: Tensor | None = None
    copy: Tensor | None = None
    version: int = -1

    def note(self) -> None:
        tensor = self.owner.get(self.name)
        if tensor is self.tensor and not self.quietly and (tensor is None or tensor._version == self.version):
            return  # most never change
        self.tensor = tensor
        if tensor is not None:
            self.copy, self.version = tensor.detach().clone(), tensor._version

    def restore(self) -> None:
        tensor, copy = self.tensor, self.copy
        if tensor is not None and copy is not None:
            self.owner[self.name] = tensor
            if self.quietly or tensor._version != self.version:
                tensor.copy_(copy)
                self.version = tensor._version


class BlockBuffers:
    """The buffers of some blocks."""

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        modules = dict.fromkeys(module for block in blocks for module in block.modules())
        self._all = [
            _Noted(module._buffers, name, isinstance(module, _NormBase))
            for module in modules
            for name in module._buffers
        ]
        self._open = False

    def note(self) -> None:
        """Note what they are: a step begins."""
        for each in self._all:
            each.note()
        self._open = True

    def keep(self) -> None:
        """Let them be what they are: the step counts."""
        self._open = False

    def restore(self) -> None:
        """Bring them back, if a step has begun and does not count."""
        if self._open:
            self._open = False
            with torch.no_grad():
                for each in self._all:
                    each.restore()
