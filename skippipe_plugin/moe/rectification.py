"""Rectify-Router (Zeng et al., arXiv 2402.12399): dropped tokens and padding of a limited capacity, put to use.

Both rectifications (the paper's figure 2, left and right) work on what :func:`~skippipe_plugin.moe.limit_capacity` has
left of a routing. The paper's weights are softmax scores; here a slot that is given anew weighs its expert's score on
the scale of the token's own choices, which is the score itself for routers that do not normalise.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from skippipe_plugin.moe.routing import Routing, count_loads, rank_within_groups

Rectify = Literal["dropped", "padding", "both"]

TINY = 1e-20


def rectify(
    routing: Routing,
    limited: Routing,
    scores: Tensor,
    capacity: int,
    what: Rectify = "both",
    *,
    bias: Tensor | None = None,
    here: Tensor | None = None,
) -> Routing:
    """Put to use what limiting ``routing`` to ``limited`` wastes; no token comes to an expert twice.

    ``"dropped"`` (intra-GPU rectification): a token that an expert dropped goes to the best expert on the device where
    the token is. Nothing travels for it, so it does not count for the capacity, which limits what travels; a device
    that has all experts therefore drops nothing. ``"padding"`` (fill-in rectification): each token offers itself to its
    next choice, the best expert that it neither chose nor visits, and experts with room left take the offers with the
    highest scores, in one slot more per token. That compares tokens with later ones. ``"both"`` does both, with the
    room that the choices alone leave.

    Args:
        routing: What the router chose, [tokens, slots].
        limited: What is left of it, in the same slots.
        scores: Of every token for every expert, [tokens, experts]; differentiable. The weights of a token's choices
            are proportional to them.
        capacity: How many tokens each expert takes of these.
        what: Which waste.
        bias: What moves the choice but not the weights, [experts].
        here: Which experts are on the tokens' device, [experts], bool; None: all.
    """
    if what not in get_args(Rectify):
        raise ValueError(f"rectify={what!r} is unknown; choose one of {', '.join(map(repr, get_args(Rectify)))}")
    ranking = scores.detach() if bias is None else scores.detach() + bias
    result = limited
    if what != "padding":
        result = _serve_dropped(routing, result, scores, ranking, here)
    if what != "dropped":
        left = capacity - count_loads(limited.experts, scores.shape[1])
        result = _fill_padding(routing, result, scores, ranking, left)
    return result


def _serve_dropped(routing: Routing, limited: Routing, scores: Tensor, ranking: Tensor, here: Tensor | None) -> Routing:
    """Give a token's emptied slots, in order, to its best experts here that it does not visit."""
    num_experts = scores.shape[1]
    dropped = (limited.experts == num_experts) & (routing.experts < num_experts)
    closed = _visits(limited, num_experts) if here is None else _visits(limited, num_experts) | ~here
    best, candidates = ranking.masked_fill(closed, float("-inf")).sort(dim=-1, descending=True)
    turn = (dropped.cumsum(-1) - 1).clamp(min=0)
    served = dropped & best.gather(1, turn).isfinite()
    experts = torch.where(served, candidates.gather(1, turn), limited.experts)
    weights = torch.where(served, _weigh(routing, scores, experts), limited.weights)
    return Routing(weights, experts)


def _fill_padding(routing: Routing, limited: Routing, scores: Tensor, ranking: Tensor, left: Tensor) -> Routing:
    """Add a slot in which experts have as many further tokens as they have room ``left``, [experts]."""
    num_experts = scores.shape[1]
    closed = _visits(routing, num_experts) | _visits(limited, num_experts)
    best, candidates = ranking.masked_fill(closed, float("-inf")).max(dim=-1, keepdim=True)
    offers = best.isfinite() & (routing.experts < num_experts).any(-1, keepdim=True)
    experts = candidates.masked_fill(~offers, num_experts)
    order = scores.detach().gather(1, candidates).squeeze(1).sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = rank_within_groups(experts.squeeze(1)[order], num_experts + 1)
    room = torch.cat([left, left.new_zeros(1)])[experts.squeeze(1)]
    experts = experts.masked_fill((ranks >= room).unsqueeze(1), num_experts)
    weights = _weigh(routing, scores, experts)
    return Routing(torch.cat([limited.weights, weights], dim=-1), torch.cat([limited.experts, experts], dim=-1))


def _weigh(routing: Routing, scores: Tensor, experts: Tensor) -> Tensor:
    """Return the scores of ``experts`` [tokens, slots] on the scale of each token's own weights; 0 for empty slots."""
    padded = torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=-1)
    total = padded.gather(1, routing.experts).sum(-1, keepdim=True).clamp(min=TINY)
    weights = padded.gather(1, experts) * (routing.weights.sum(-1, keepdim=True) / total)
    return weights.to(routing.weights.dtype)


def _visits(routing: Routing, num_experts: int) -> Tensor:
    """Return which experts each token visits: [tokens, experts], bool."""
    visits = torch.zeros(len(routing.experts), num_experts + 1, dtype=torch.bool, device=routing.experts.device)
    return visits.scatter_(1, routing.experts, True)[:, :num_experts]
