"""torchmetrics for the load of experts; each is updated with the :class:`RouterStatistics` of one router."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from skippipe_plugin.moe.attach import RouterStatistics
from skippipe_plugin.moe.balance import max_violation


class ExpertShare(Metric):
    """The share of all visits that each expert got: [experts]; 1 / experts each is perfect balance."""

    full_state_update = False
    loads: Tensor

    def __init__(self, num_experts: int) -> None:
        """Count visits of ``num_experts`` experts."""
        super().__init__()
        self.add_state("loads", torch.zeros(num_experts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, statistics: RouterStatistics) -> None:
        """Add what a router saw."""
        self.loads += statistics.loads.to(self.loads.device)

    def compute(self) -> Tensor:
        """Return the shares; zeros before any visit."""
        return self.loads / self.loads.sum().clamp(min=1)


class MaxViolation(ExpertShare):
    """MaxVio of all visits so far: ``(max - mean) / mean`` (arXiv 2408.15664, section 4.1)."""

    def compute(self) -> Tensor:
        """Return a scalar; 0 before any visit."""
        return torch.tensor(max_violation(self.loads))


class EmptyShare(Metric):
    """The share of slots without an expert: dropped tokens and null experts."""

    full_state_update = False
    num_empty: Tensor
    num_filled: Tensor

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        for name in ("num_empty", "num_filled"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, statistics: RouterStatistics) -> None:
        """Add what a router saw."""
        self.num_empty += statistics.num_empty
        self.num_filled += statistics.loads.sum().to(self.num_filled.device)

    def compute(self) -> Tensor:
        """Return a scalar; 0 before any slot."""
        return self.num_empty / (self.num_empty + self.num_filled).clamp(min=1)


class RouterEntropy(Metric):
    """The mean over tokens of the entropy, in nats, of a softmax over the router's logits."""

    full_state_update = False
    entropy: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.add_state("entropy", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, statistics: RouterStatistics) -> None:
        """Add what a router saw."""
        self.entropy += statistics.entropy
        self.num_tokens += statistics.num_tokens

    def compute(self) -> Tensor:
        """Return a scalar; 0 before any token."""
        return self.entropy / self.num_tokens.clamp(min=1)
