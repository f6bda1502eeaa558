"""Models that people write by hand, small. Imports torch only, because workers import this module."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 32
WIDTH = 16
DEPTH = 4


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)


class EncoderDecoder(nn.Module):
    """torch's own encoder and decoder between an embedding and a head, as in its tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.transformer = nn.Transformer(WIDTH, 2, DEPTH, DEPTH, 32, dropout=0.0, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        made = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=causal)
        return self.head(made)


class DiTBlock(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by what the condition says (adaLN-zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(approximate="tanh"), nn.Linear(32, WIDTH))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        h = self.norm(x) * (1 + scale) + shift
        x = x + gate * self.attention(h, h, h, need_weights=False)[0]
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer: patches, a time, a class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.classes = nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(DEPTH))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        condition = self.time(time[:, None]) + self.classes(label)
        return self.head(functools.reduce(lambda h, block: block(h, condition), self.blocks, self.patches(x)))


class ConvBlock(nn.Module):
    """Half of the way down or up again; a block on the way up takes what the way down has left."""

    def __init__(self, inputs: int = 8) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, 8, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        joined = x if skip is None else torch.cat([x, skip], 1)
        return x + self.conv(F.silu(self.norm(joined)))


class UNet(nn.Module):
    """Convolutions down and up, in two lists, with skip connections between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.down = nn.ModuleList(ConvBlock() for _ in range(DEPTH))
        self.up = nn.ModuleList(ConvBlock(16) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.stem(x), []
        for block in self.down:
            h = block(h)
            skips.append(h)
        h = F.interpolate(F.avg_pool2d(h, 2), scale_factor=2)
        for block in self.up:
            h = block(h, skips.pop())
        return self.head(h)


class UViT(nn.Module):
    """One stack, whose second half gets what the first half has made."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(encoder_layer() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.patches(x), []
        for block in self.blocks[: DEPTH // 2]:
            h = block(h)
            skips.append(h)
        for block in self.blocks[DEPTH // 2 :]:
            h = block(h + skips.pop())
        return self.head(h)


class ResidualBlock(nn.Module):
    """Takes and gives the hidden states and the residual, which is added at the next norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(self.linear(self.norm(residual))), residual


class TwoStreams(nn.Module):
    """A language model whose blocks pass on two tensors, as in Mamba's and vLLM's code."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, VOCABULARY),
        )
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(DEPTH))

    def forward(self, ids: Tensor) -> Tensor:
        hidden, residual = self.embedding(ids), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        return self.head(self.norm(hidden + residual))


class DeepHeads(nn.Module):
    """An encoder and a decoder of queries with a head over the output of every layer of it, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.queries = nn.Embedding(5, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True) for _ in range(DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        memory = self.patches(x)
        h, outputs = self.queries.weight.expand(len(x), -1, -1), []
        for layer in self.decoder:
            h = layer(h, memory)
            outputs.append(self.head(self.norm(h)))
        return torch.stack(outputs)


class Generator(nn.Module):
    """Makes points of noise, in residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Residual() for _ in range(DEPTH))

    def forward(self, noise: Tensor) -> Tensor:
        return self.head(functools.reduce(lambda h, block: block(h), self.blocks, self.stem(noise)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))
