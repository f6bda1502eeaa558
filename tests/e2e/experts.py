"""A model with experts, as users write it; workers import this module, so it imports little."""

import torch
from torch import nn

from skippipe_plugin.moe import MoELayer


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(width), MoELayer(width, 12, 4, router="sigmoid")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.moe(self.norm(hidden))


class Own(nn.Module):
    """A hand-written model with our layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, width), nn.Linear(width, 32)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)
