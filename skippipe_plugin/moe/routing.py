"""What a router decides, its checks, and the capacity of experts: pure functions on tensors.

A routing lists for each token the experts it visits, in slots. An empty slot (a null expert, a token that was dropped)
holds the expert index ``num_experts`` and the weight 0; transformers uses the same sentinel.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Priority = Literal["position", "choice", "weight"]


class Routing(NamedTuple):
    """Which experts each token visits, and with which weight.

    Both are ``[tokens, slots]``; the number of slots may differ from the router's ``top_k``.
    """

    weights: Tensor
    experts: Tensor


Router = Callable[[Tensor, int, "Tensor | None"], "Routing | tuple[Tensor, Tensor]"]
"""Any callable ``(logits [tokens, experts], top_k, bias [experts] or None) -> (weights, index)``.

The bias moves the choice of experts and never the weights (Wang et al., arXiv 2408.15664). A router whose choice for
a token depends on later tokens says so with an attribute ``causal = False``; one whose last logits belong to null
experts has an attribute ``num_null``.
"""


def route(router: Router, logits: Tensor, top_k: int, bias: Tensor | None = None, *, where: str = "") -> Routing:
    """Ask ``router`` and check question and answer; ``where`` names the layer in errors.

    Raises:
        ValueError: logits with NaN, ``top_k`` out of range, or an answer of the wrong shapes, types or indices.
    """
    place = f" of {where}" if where else ""
    if logits.dim() != 2:
        raise ValueError(f"router logits{place} have the shape {tuple(logits.shape)}; [tokens, experts] is needed")
    tokens, width = logits.shape
    if not 1 <= top_k <= width:
        raise ValueError(f"top_k={top_k}{place} is out of range; it is at least 1 and at most {width} (experts)")
    check_logits(logits, where)
    routing = Routing(*router(logits, top_k, bias))
    _check_answer(router, routing, tokens, width - num_null(router), place)
    return routing


def check_logits(logits: Tensor, where: str = "") -> None:
    """Raise a ValueError that names the layer if a logit is NaN: a choice among NaNs is arbitrary and silent."""
    if logits.isnan().any():
        tokens = int(logits.isnan().any(-1).sum())
        raise ValueError(
            f"router logits{f' of {where}' if where else ''} are NaN for {tokens} of {logits.shape[0]} tokens; the "
            "hidden states or the router's weights have diverged (lower the learning rate, clip gradients)"
        )


def _check_answer(router: Router, routing: Routing, tokens: int, num_experts: int, place: str) -> None:
    weights, index = routing
    name = getattr(router, "__name__", type(router).__name__)
    if weights.dim() != 2 or weights.shape != index.shape or weights.shape[0] != tokens:
        raise ValueError(
            f"the router {name}{place} returned weights {tuple(weights.shape)} and index {tuple(index.shape)}; both "
            f"must be [{tokens} tokens, slots]"
        )
    if index.dtype != torch.int64 or not weights.is_floating_point():
        raise ValueError(
            f"the router {name}{place} returned weights of {weights.dtype} and an index of {index.dtype}; floating "
            "point and torch.int64 are needed"
        )
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= num_experts:
        raise ValueError(
            f"the router {name}{place} chose experts {int(index.min())} to {int(index.max())}; there are 0 to "
            f"{num_experts - 1}, and {num_experts} for an empty slot"
        )


def is_causal(router: Router) -> bool:
    """Tell whether a token's experts are independent of the tokens after it."""
    return bool(getattr(router, "causal", True))


def warn_unless_causal(router: Router) -> None:
    """Warn that a causal language model would learn from tokens that do not exist when it generates."""
    if not is_causal(router):
        warnings.warn(
            f"the router {router} looks at later tokens when it chooses for an earlier one: a causal language model "
            "leaks the future through it, and its loss is better than it will be in generation. Choose another router "
            "(GShard(priority='position') also limits capacity), or say causal=False",
            stacklevel=3,
        )


def num_null(router: Router) -> int:
    """Return how many of the logits belong to null experts."""
    return int(getattr(router, "num_null", 0))


def count_loads(index: Tensor, num_experts: int) -> Tensor:
    """Return how many tokens visit each expert: ``[num_experts]``, int64; empty slots count nowhere."""
    return torch.bincount(index.reshape(-1), minlength=num_experts + 1)[:num_experts]


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Return how many tokens an expert takes: ``ceil(factor * tokens * top_k / num_experts)``.

    The even share times the capacity factor (Switch Transformers, arXiv 2101.03961, section 2.2).
    """
    return math.ceil(factor * tokens * top_k / num_experts)


def limit_capacity(routing: Routing, num_experts: int, capacity: int, priority: Priority = "position") -> Routing:
    """Empty the slots beyond ``capacity`` tokens per expert; the weights of what stays do not change.

    ``priority`` says who comes first: ``"position"`` earlier tokens; ``"choice"`` every token's first choice before
    any second choice (GShard, arXiv 2006.16668, algorithm 1); ``"weight"`` larger weights (batch prioritised routing,
    arXiv 2106.05974). Only ``"position"`` lets no token depend on a later one.
    """
    if priority not in get_args(Priority):
        raise ValueError(f"priority={priority!r} is unknown; choose one of {', '.join(get_args(Priority))}")
    tokens, slots = routing.experts.shape
    index = routing.experts.reshape(-1)
    if priority == "position":
        order = torch.arange(tokens * slots, device=index.device)
    elif priority == "choice":
        order = torch.arange(tokens * slots, device=index.device).view(tokens, slots).t().reshape(-1)
    else:
        order = routing.weights.detach().reshape(-1).sort(descending=True, stable=True).indices
    ranks = torch.empty_like(index)
    ranks[order] = rank_within_groups(index[order], num_experts + 1)
    full = (ranks >= capacity).view(tokens, slots)
    return empty_slots(routing, full, num_experts)


def empty_slots(routing: Routing, mask: Tensor, num_experts: int) -> Routing:
    """Empty the slots where ``mask`` ([tokens, slots], bool) is true."""
    return Routing(routing.weights.masked_fill(mask, 0.0), routing.experts.masked_fill(mask, num_experts))


def rank_within_groups(groups: Tensor, num_groups: int) -> Tensor:
    """Number the members of each group from 0, in their order: ``[2, 0, 2, 2] -> [0, 0, 1, 2]``."""
    members, order = groups.sort(stable=True)
    sizes = torch.bincount(groups, minlength=num_groups)
    starts = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(groups)
    ranks[order] = torch.arange(len(groups), device=groups.device) - starts[members]
    return ranks
