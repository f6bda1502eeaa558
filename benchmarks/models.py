"""The models that the benchmarks train: stacks of equal blocks, and what a benchmark case says about them.

Workers import the block classes from here, so nothing but classes and functions stands in this module.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Case:
    """One model with its batch; every contender of a benchmark runs the same."""

    name: str
    block: str
    num_blocks: int
    microbatch: tuple[int, ...]
    num_microbatches: int
    forward_s: float = 0.0
    backward_s: float = 0.0
    num_heads: int = 4

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Case:
        """Read what :func:`dataclasses.asdict` and JSON made of a case."""
        return cls(**{**fields, "microbatch": tuple(fields["microbatch"])})

    @property
    def message_bytes(self) -> int:
        """Bytes of one activation or gradient on its way between two stages."""
        return 4 * torch.Size(self.microbatch).numel()


class TransformerBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(self.norm1(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradients[0], torch.zeros(1), None, None


class SleepBlock(nn.Module):
    """A block on a device of its own: its compute takes time and no processor. Runtime and messages stay real."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, hidden: Tensor) -> Tensor:
        return _Sleep.apply(hidden, self.weight, self.forward_s, self.backward_s)


class Stack(nn.Module):
    """A model that is nothing but blocks."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def make_blocks(case: Case) -> list[nn.Module]:
    """Build the blocks of a case, in every process with the same weights."""
    torch.manual_seed(0)
    width = case.microbatch[-1]
    makers = {
        "transformer": lambda: TransformerBlock(width, case.num_heads),
        "linear": lambda: nn.Linear(width, width),
        "sleep": lambda: SleepBlock(case.forward_s, case.backward_s),
    }
    return [makers[case.block]() for _ in range(case.num_blocks)]


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of a whole batch."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.num_microbatches * case.microbatch[0], *case.microbatch[1:])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """The loss of a microbatch."""
    return functional.mse_loss(output, target)
