"""Gates: the parameters that turn hidden states into a router's logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearGate(nn.Module):
    """One embedding per expert; a token's logits are its products with them. No bias."""

    def __init__(self, dim: int, num_experts: int) -> None:
        """Make embeddings ``[num_experts, dim]``, initialised like ``nn.Linear``."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [tokens, experts] of ``hidden`` [tokens, dim]."""
        return F.linear(hidden, self.weight)


class CosineGate(nn.Module):
    """Cosine between a low-rank projection and expert embeddings over a learned temperature (X-MoE, arXiv 2204.09179).

    Equation 5: ``s_i = cos(W h, e_i) / tau``. Neither long hidden states nor long embeddings win, which keeps the
    representation from collapsing onto the experts' centroids.
    """

    min_temperature = 0.01

    def __init__(self, dim: int, num_experts: int, rank: int | None = None, temperature: float = 0.5) -> None:
        """Project to ``rank`` dimensions; None: half the number of experts, as in the paper, but at least 8.

        The temperature starts at 0.5 and stays above 0.01, as in Tutel.
        """
        super().__init__()
        rank = rank or max(8, num_experts // 2)
        self.projection = nn.Parameter(torch.empty(rank, dim))
        self.weight = nn.Parameter(torch.empty(num_experts, rank))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))
        nn.init.orthogonal_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [tokens, experts] of ``hidden`` [tokens, dim]."""
        projected = F.normalize(F.linear(hidden, self.projection), dim=-1)
        temperature = self.log_temperature.exp().clamp(min=self.min_temperature)
        return F.linear(projected, F.normalize(self.weight, dim=-1)) / temperature
