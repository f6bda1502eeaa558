"""Rules that keep experts evenly loaded: pure functions on loads, scores and biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def max_violation(loads: Tensor) -> float:
    """Return MaxVio, ``(max - mean) / mean`` of ``loads`` (Wang et al., arXiv 2408.15664, section 4.1).

    0 is perfect balance, ``num_experts - 1`` all tokens at one expert; no tokens at all count as balanced.

    >>> max_violation(torch.tensor([30, 10, 20]))
    0.5
    """
    mean = float(loads.double().mean())
    return float(loads.max()) / mean - 1 if mean else 0.0


def update_by_sign(bias: Tensor, loads: Tensor, rate: float = 1e-3) -> Tensor:
    """Return ``bias + rate * sign(mean - loads)``: loss-free balancing (arXiv 2408.15664, algorithm 1).

    ``loads`` are those of a whole optimizer step. The paper's rate takes one or two hundred steps from a skewed start.
    """
    return bias + rate * torch.sign(_shortfall(bias, loads))


def update_in_proportion(bias: Tensor, loads: Tensor, rate: float = 1e-2) -> Tensor:
    """Return ``bias + rate * (mean - loads) / mean``: faster far from balance, calmer near it."""
    shortfall = _shortfall(bias, loads)
    mean = loads.to(bias).mean()
    return bias + rate * shortfall / mean if mean > 0 else bias.clone()


def _shortfall(bias: Tensor, loads: Tensor) -> Tensor:
    if bias.shape != loads.shape:
        raise ValueError(f"a bias {tuple(bias.shape)} and loads {tuple(loads.shape)} are not of the same experts")
    loads = loads.to(bias)
    return loads.mean() - loads


BIAS_RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "sign": update_by_sign,
    "proportional": update_in_proportion,
}
"""Rules for the selection bias by name: ``(bias, loads, rate) -> bias``."""


def quantile_bias(scores: Tensor, top_k: int, bias: Tensor) -> Tensor:
    """Return the bias that a step of quantile balancing takes from one microbatch's ``scores`` [tokens, experts].

    Coordinate descent on the dual of the balanced assignment problem (``quantile_balancing`` of Megatron-LM): each
    token's price is its ``top_k + 1``-th best ``score + bias``; an expert's bias is then set so that its even share of
    tokens would still pay that price. Average it over the microbatches of a step, weighted by their tokens.
    """
    tokens, num_experts = scores.shape
    if not 1 <= top_k < num_experts:
        raise ValueError(f"top_k={top_k} is out of range; quantile balancing needs 1 to {num_experts - 1}")
    share = tokens * top_k // num_experts
    if share >= tokens or tokens == 0:
        return bias.clone()
    prices = (scores + bias).topk(top_k + 1, dim=-1).values[:, -1:]
    return -(scores - prices).topk(share + 1, dim=0).values[-1]


def load_balancing_loss(scores: Tensor, loads: Tensor) -> Tensor:
    """Return ``E * sum_i f_i P_i`` with the loads' shares f and the mean scores P (arXiv 2101.03961, equation 4).

    Args:
        scores: Softmax over the logits of a microbatch, [tokens, experts]; the loss is differentiable in them.
        loads: Visits of each expert, [experts]. Those of all microbatches so far in the step, not only of this one,
            give the loss on global-batch statistics (Qiu et al., arXiv 2501.11873, algorithm 1), which lets single
            microbatches be as skewed as their text.
    """
    total = loads.sum().clamp(min=1)
    if len(scores) == 0:
        return scores.sum()
    return loads.numel() * (loads / total).to(scores) @ scores.mean(0)


def spread_null_loads(loads: Tensor, num_experts: int, num_null: int) -> Tensor:
    """Return by expert, null experts last, how often it was chosen: [experts + null experts], float64.

    Null experts do the same, so which of them is chosen does not matter: each gets the mean over them (AdaMoE,
    arXiv 2406.13233, section 3.3), and the balancing loss governs how often tokens choose any.

    Args:
        loads: Visits of each true expert and, where there are null experts, of all of those together.
        num_experts: How many true experts there are.
        num_null: How many null experts there are.

    >>> spread_null_loads(torch.tensor([5, 1, 6]), 2, 3).tolist()
    [5.0, 1.0, 2.0, 2.0, 2.0]
    """
    loads = loads.double()
    return torch.cat([loads[:num_experts], loads[num_experts:].repeat_interleave(num_null) / max(1, num_null)])


def add_auxiliary_loss(weights: Tensor, loss: Tensor) -> Tensor:
    """Return ``weights``; in backward also back-propagate ``loss``, as if it had been added to the model's own.

    So that a loss on a router need not travel to where the model computes its loss.
    """
    result: Tensor = _WithLoss.apply(weights, loss)  # type: ignore[no-untyped-call]
    return result


def add_balancing_gradient(weights: Tensor, scores: Tensor, loads: Callable[[], Tensor], scale: float) -> Tensor:
    """Return ``weights``; in backward also back-propagate ``scale`` times :func:`load_balancing_loss`.

    The loss is linear in the mean scores, so the loads are needed in the backward only, when more is known of them.

    Args:
        weights: What the model's own loss depends on.
        scores: Softmax over the logits of a microbatch, [tokens, experts].
        loads: Returns, in the backward, the visits of each expert: [experts].
        scale: The factor.
    """
    if len(scores) == 0:
        return weights
    result: Tensor = _WithGradient.apply(weights, scores.mean(0), loads, scale)  # type: ignore[no-untyped-call]
    return result


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, means: Tensor, loads: Callable[[], Tensor], scale: float) -> Tensor:
        ctx.loads, ctx.scale, ctx.like = loads, scale, (means.dtype, means.device)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        loads = ctx.loads()
        dtype, device = ctx.like
        share = (loads / loads.sum().clamp(min=1)).to(device=device, dtype=dtype)
        return gradient, ctx.scale * loads.numel() * share, None, None


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:  # Any: torch's context
        ctx.save_for_backward(loss)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)
