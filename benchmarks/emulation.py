"""Partial paths in one process: the byte-level model of the examples, each microbatch on a path of its own.

A partial run in the pipeline equals this (tests/e2e/test_partial.py; `convergence.py` checks it again on its own
paths), and it trains at the speed of one process. Also blocks that take as long as a device's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(FilePath(__file__).parents[1] / "examples"))
from byte_lm import Block, ByteDataset, ByteLM, default_text

__all__ = ["ByteDataset", "ByteLM", "DeviceBlock", "EmulatedLM", "Paths", "default_text", "follow", "on_devices"]

Paths = tuple[tuple[int, ...], ...]
"""By microbatch: the stages it visits, in order, from 1; here a stage is one block."""


def follow(blocks: Sequence[nn.Module], hidden: Tensor, paths: Paths) -> Tensor:
    """Send each of ``len(paths)`` equal pieces of a batch along its own path.

    A block runs once on all the pieces that wait for it; blocks do not mix samples, so that changes nothing.
    """
    pieces, ahead = list(hidden.chunk(len(paths))), list(paths)
    while any(ahead):
        stage = min(path[0] for path in ahead if path)
        ready = [index for index, path in enumerate(ahead) if path[:1] == (stage,)]
        outputs = blocks[stage - 1](torch.cat([pieces[index] for index in ready])).chunk(len(ready))
        for index, output in zip(ready, outputs, strict=True):
            pieces[index], ahead[index] = output, ahead[index][1:]
    return torch.cat(pieces)


class EmulatedLM(ByteLM):
    """Trains on paths, without any pipeline, until ``exact_from``; evaluates with every block.

    Args:
        paths: The path of each microbatch; empty for exact training.
        exact_from: The step from which every block is visited.
        gradient_scale: As in `SkipPipeStrategy`.
        size: For ByteLM.
    """

    def __init__(
        self, paths: Paths = (), exact_from: float = float("inf"), gradient_scale: str = "batch", **size: Any
    ) -> None:
        super().__init__(**size)
        self.paths, self.exact_from, self.gradient_scale = paths, exact_from, gradient_scale

    @property
    def skips(self) -> bool:
        """Whether this step follows the paths."""
        return bool(self.paths) and self.training and self.global_step < self.exact_from

    def forward(self, tokens: Tensor) -> Tensor:
        return self.on_paths(tokens) if self.skips else super().forward(tokens)

    def on_paths(self, tokens: Tensor) -> Tensor:
        """Return the logits when each of ``len(paths)`` equal pieces of the batch follows its path."""
        hidden = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(follow(self.blocks, hidden, self.paths)))
        return logits

    def on_after_backward(self) -> None:
        if not self.skips or self.gradient_scale == "batch":
            return
        for stage, block in enumerate(self.blocks, 1):
            share = sum(stage in path for path in self.paths) / len(self.paths)
            for parameter in block.parameters():
                if parameter.grad is not None:
                    parameter.grad /= share


class _Sleep(torch.autograd.Function):
    """Takes its time in both directions, and changes nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradient, None, None


class DeviceBlock(Block):
    """A block that takes as long as on an emulated device."""

    forward_s = backward_s = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Sleep.apply(x, self.forward_s, self.backward_s))


def on_devices(model: ByteLM, forward_s: float, backward_s: float) -> ByteLM:
    """Let each block of a model take that long; its results stay the same."""
    for block in model.blocks:
        block.__class__ = DeviceBlock
        block.forward_s, block.backward_s = forward_s, backward_s
    return model
