"""Routers as small immutable rules on logits, by name in :data:`ROUTERS`.

Each is called as ``router(logits, top_k, bias)`` and returns a :class:`~skippipe_plugin.moe.routing.Routing`. Scores
are computed in float32 at least. What has parameters of its own is a gate (``gates.py``) and makes the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from skippipe_plugin.moe.routing import (
    Priority,
    Router,
    Routing,
    empty_slots,
    expert_capacity,
    limit_capacity,
)

EPSILON = 1e-20  # DeepSeek-V3's own guard of the normalisation


def scores_of(logits: Tensor) -> Tensor:
    """Return the logits in the precision that scores are computed in: float32, or float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _choose(scores: Tensor, top_k: int, bias: Tensor | None) -> Routing:
    """Choose by ``scores + bias``, weigh by ``scores``."""
    index = (scores if bias is None else scores + bias).topk(top_k, dim=-1).indices
    return Routing(scores.gather(-1, index), index)


def _renormalise(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + EPSILON)


@dataclass(frozen=True, slots=True, kw_only=True)
class Softmax:
    """Softmax over all experts, then the ``top_k`` largest.

    Renormalised weights equal a softmax over the chosen logits alone, so this is the router of Mixtral, Granite and
    GPT-OSS; Qwen-MoE and OLMoE renormalise or not by ``norm_topk_prob``.
    """

    renormalise: bool = True
    """Let a token's weights sum to one."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return what the bias is added to: [tokens, experts]."""
        return scores_of(logits).softmax(-1)

    def __call__(self, logits: Tensor, top_k: int, bias: Tensor | None = None) -> Routing:
        """Route ``logits`` [tokens, experts]."""
        weights, index = _choose(self.scores(logits), top_k, bias)
        return Routing(_renormalise(weights) if self.renormalise else weights, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sigmoid:
    """Sigmoid scores; with a bias the loss-free balanced router of DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16).

    Node-limited routing: the experts form ``num_groups`` equal groups, a group's score is the sum of its two best
    ``score + bias``, and only the ``top_groups`` best groups are open to the token.
    """

    renormalise: bool = True
    """Let a token's weights sum to ``scale``."""
    scale: float = 1.0
    """The factor of the weights (``routed_scaling_factor``)."""
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} is out of range; it is 1 to num_groups={self.num_groups}")

    def scores(self, logits: Tensor) -> Tensor:
        """Return what the bias is added to: [tokens, experts]."""
        return scores_of(logits).sigmoid()

    def __call__(self, logits: Tensor, top_k: int, bias: Tensor | None = None) -> Routing:
        """Route ``logits`` [tokens, experts]."""
        scores = self.scores(logits)
        choice = scores if bias is None else scores + bias
        if self.top_groups < self.num_groups:
            choice = choice.masked_fill(~self._open(choice, top_k), float("-inf"))
        index = choice.topk(top_k, dim=-1).indices
        weights = scores.gather(-1, index)
        return Routing((_renormalise(weights) if self.renormalise else weights) * self.scale, index)

    def _open(self, choice: Tensor, top_k: int) -> Tensor:
        """Return which experts are in a token's open groups: [tokens, experts], bool."""
        tokens, num_experts = choice.shape
        size, rest = divmod(num_experts, self.num_groups)
        if rest or top_k > size * self.top_groups:
            raise ValueError(
                f"{num_experts} experts in num_groups={self.num_groups} with top_groups={self.top_groups} open do not "
                f"serve top_k={top_k}; groups must be equal, and the open ones must hold top_k experts"
            )
        best = choice.view(tokens, self.num_groups, size).topk(min(2, size), dim=-1).values.sum(-1)
        groups = best.topk(self.top_groups, dim=-1).indices
        is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
        return is_open.repeat_interleave(size, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GShard:
    """Softmax top-k with a limit on the tokens per expert (GShard, arXiv 2006.16668, algorithm 1; it has ``top_k=2``).

    Weights are normalised over a token's choices before any is dropped; a token that loses all of them passes by the
    experts. ``priority="choice"`` is the paper's order and looks at later tokens; ``"position"`` does not.
    """

    capacity_factor: float = 1.25
    """How many times its even share an expert takes."""
    priority: Priority = "choice"
    """Who comes first; see :func:`~skippipe_plugin.moe.limit_capacity`."""
    random_dispatch: bool = False
    """Keep a second choice of weight g with the probability ``min(1, 2 g)`` only, as the paper does in training."""

    def __post_init__(self) -> None:
        check_capacity_factor(self.capacity_factor)

    @property
    def causal(self) -> bool:
        """Whether a token's experts are independent of the tokens after it."""
        return self.priority == "position"

    def __call__(self, logits: Tensor, top_k: int, bias: Tensor | None = None) -> Routing:
        """Route ``logits`` [tokens, experts]."""
        tokens, num_experts = logits.shape
        routing = Softmax()(logits, top_k, bias)
        if self.random_dispatch:
            chance = torch.rand(tokens, top_k, device=logits.device) >= 2 * routing.weights
            chance[:, :1] = False
            routing = empty_slots(routing, chance, num_experts)
        capacity = expert_capacity(tokens, top_k, num_experts, self.capacity_factor)
        return limit_capacity(routing, num_experts, capacity, self.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertChoice:
    """Each expert takes its best tokens (Zhou et al., arXiv 2202.09368, section 3.2): balanced by construction.

    The weight is the softmax over experts of a chosen pair. An expert compares tokens with later ones, so in a causal
    language model the choice leaks the future, and it differs from generation, where later tokens do not exist.
    """

    capacity_factor: float = 1.0
    """How many times its even share ``tokens * top_k / experts`` an expert takes."""
    causal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_capacity_factor(self.capacity_factor)

    def __call__(self, logits: Tensor, top_k: int, bias: Tensor | None = None) -> Routing:
        """Route ``logits`` [tokens, experts]; a bias, the same for all of an expert's tokens, changes nothing."""
        tokens, num_experts = logits.shape
        capacity = min(tokens, expert_capacity(tokens, top_k, num_experts, self.capacity_factor))
        scores = scores_of(logits).softmax(-1)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(0, scores.topk(capacity, dim=0).indices, True)
        # One slot per expert, then as few columns as the busiest token needs.
        slots = int(chosen.sum(-1).max()) if tokens else 0
        experts = torch.arange(num_experts, device=logits.device).expand(tokens, -1).masked_fill(~chosen, num_experts)
        index, order = experts.sort(dim=-1)
        return Routing((scores * chosen).gather(-1, order)[:, :slots], index[:, :slots])


@dataclass(frozen=True, slots=True, kw_only=True)
class NullExperts:
    """Tokens may choose nothing (AdaMoE, arXiv 2406.13233): the last ``num_null`` logits belong to empty experts.

    Softmax and top-k run over true and null experts alike; the weights are renormalised over a token's true experts,
    and a token that chose null experts only gets nothing. Needs a gate with ``experts + num_null`` outputs.
    """

    num_null: int = 1

    def __post_init__(self) -> None:
        if self.num_null < 1:
            raise ValueError(f"num_null={self.num_null} is out of range; it is at least 1")

    def __call__(self, logits: Tensor, top_k: int, bias: Tensor | None = None) -> Routing:
        """Route ``logits`` [tokens, experts + num_null]; the indices are those of true experts, or the sentinel."""
        num_experts = logits.shape[-1] - self.num_null
        if num_experts < 1:
            raise ValueError(f"num_null={self.num_null} leaves no true expert among {logits.shape[-1]} logits")
        weights, index = _choose(scores_of(logits).softmax(-1), top_k, bias)
        weights, index = empty_slots(Routing(weights, index), index >= num_experts, num_experts)
        return Routing(_renormalise(weights), index)


ROUTERS: dict[str, type[Softmax | Sigmoid | GShard | ExpertChoice | NullExperts]] = {
    "softmax": Softmax,
    "sigmoid": Sigmoid,
    "gshard": GShard,
    "expert_choice": ExpertChoice,
    "null_experts": NullExperts,
}
"""Routers by name, with their defaults. ``"cosine"`` is :class:`Softmax` behind a cosine gate (``gates.py``)."""


def find_router(router: str | Router) -> Router:
    """Return the router of that name, or the callable itself.

    >>> find_router("sigmoid")
    Sigmoid(renormalise=True, scale=1.0, num_groups=1, top_groups=1)
    """
    if callable(router):
        return router
    if router not in ROUTERS:
        raise ValueError(f"router={router!r} is unknown; choose one of {', '.join(ROUTERS)}, or pass a callable")
    return ROUTERS[router]()


def check_capacity_factor(factor: float) -> None:
    """Raise a ValueError unless ``factor`` is positive and finite."""
    if not 0 < factor < float("inf"):
        raise ValueError(f"capacity_factor={factor} is out of range; it is positive (1.0: the even share)")
