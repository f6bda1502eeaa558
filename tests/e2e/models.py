"""Networks for the tests, as users write them. Imports torch only, because workers import this module."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Causal self-attention with one matrix for query, key and value."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class TanhBlock(nn.Module):
    """The smallest block that is not linear: eight features, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Widen(nn.Module):
    """A block that changes the width of the hidden states."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, wider)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.project(x))


class Transformer(nn.Module):
    """A hand-written language model; ``tied`` makes head and embedding one matrix."""

    def __init__(
        self, vocabulary: int = 32, width: int = 16, depth: int = 6, dropout: float = 0.0, *, tied: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(16, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.drop(self.embedding(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp(features: int = 8, width: int = 16, classes: int = 4, depth: int = 6) -> nn.Sequential:
    """Linear and ReLU in turns, without any repeated composite block."""
    sizes = [features, *[width] * (depth - 1), classes]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tokens(samples: int, length: int = 8, vocabulary: int = 32, seed: int = 0) -> Tensor:
    """Draw sequences with something to learn: each token depends on the one before it."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(vocabulary, (samples, 1), generator=generator)
    jumps = torch.randint(1, 4, (samples, length), generator=generator)
    return (start + jumps.cumsum(1)) % vocabulary


class Telling(nn.Module):
    """A block that computes something else when it is compiled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.plain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * (2.0 if torch.compiler.is_compiling() else self.plain)


class SignMomentum(torch.optim.Optimizer):
    """An optimizer of the user's own."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in filter(lambda p: p.grad is not None, group["params"]):
                state = self.state[parameter]
                state["mean"] = state.get("mean", torch.zeros_like(parameter)).lerp(parameter.grad, 1 - group["beta"])
                parameter.add_(torch.tanh(state["mean"] * 100), alpha=-group["lr"])
        return loss
