"""A mixture-of-experts layer for people who write their own model; the adapters treat it like a known family."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skippipe_plugin.moe.experts import ExpertWeights
from skippipe_plugin.moe.gates import CosineGate, LinearGate
from skippipe_plugin.moe.parallel import run_module
from skippipe_plugin.moe.routers import find_router
from skippipe_plugin.moe.routing import Router, Routing, num_null, route, warn_unless_causal


class MoELayer(nn.Module):
    """Gated experts behind a router, in place of a transformer's feed-forward layer.

    Experts are SwiGLU: ``down(silu(gate(x)) * up(x))`` without biases. With ``iterations`` above 1 the layer is a
    Chain-of-Experts (arXiv 2506.18945, equation 3): each iteration has a router of its own, all share the experts, and
    ``x_t = x_{t-1} + experts(x_{t-1})``, so the result then includes the input.

    >>> layer = MoELayer(dim=16, width=32, num_experts=4, top_k=2, router="sigmoid")
    >>> layer(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        router: str | Router = "softmax",
        iterations: int = 1,
        causal: bool = True,
    ) -> None:
        """Make experts of inner size ``width`` on hidden states of size ``dim``.

        Args:
            dim: The size of the hidden states.
            width: The inner size of an expert.
            num_experts: How many experts the layer has, null experts not counted.
            top_k: How many experts a token chooses in each iteration.
            router: A name of :data:`~skippipe_plugin.moe.routers.ROUTERS`, ``"cosine"``, or a callable.
            iterations: How often a token passes the experts.
            causal: Whether no token may depend on a later one; routers that break this are warned about.

        Raises:
            ValueError: A size below 1, more choices than there are logits, or an unknown router.
        """
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("num_experts", num_experts), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"{name}={value} is out of range; it is at least 1")
        routers = [MoERouter(dim, num_experts, top_k, router) for _ in range(iterations)]
        self.routers = nn.ModuleList(routers)
        self.experts = Experts(dim, width, num_experts)
        if causal:
            warn_unless_causal(routers[0].rule)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output for ``hidden`` [..., dim], in the same shape."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        for router in self.own_routers():
            _, weights, index = router(tokens)
            output = self.experts(tokens, index, weights)
            tokens = output if len(self.routers) == 1 else tokens + output
        return tokens.view(hidden.shape)

    def own_routers(self) -> list[MoERouter]:
        """List the routers, one for each iteration."""
        return [router for router in self.routers if isinstance(router, MoERouter)]


class MoERouter(nn.Module):
    """A gate and a rule; returns (logits, weights, index) as the routers of transformers do."""

    selection_bias: Tensor

    def __init__(self, dim: int, num_experts: int, top_k: int, router: str | Router) -> None:
        """Make a gate for ``num_experts`` and the router's null experts."""
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.rule = find_router("softmax" if router == "cosine" else router)
        outputs = num_experts + num_null(self.rule)
        if not 1 <= top_k <= outputs:
            raise ValueError(f"top_k={top_k} is out of range; it is at least 1 and at most {outputs} (experts)")
        self.gate = CosineGate(dim, outputs) if router == "cosine" else LinearGate(dim, outputs)
        self.register_buffer("selection_bias", torch.zeros(outputs))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route ``hidden`` [tokens, dim]; the selection bias moves the choice only."""
        logits = self.gate(hidden)
        return (logits, *route(self.rule, logits, self.top_k, self.selection_bias))


class Experts(nn.Module):
    """SwiGLU experts with stacked weights, named as in transformers."""

    def __init__(self, dim: int, width: int, num_experts: int) -> None:
        """Initialise every expert like ``nn.Linear``."""
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, width))
        nn.init.uniform_(self.gate_up_proj, -1 / math.sqrt(dim), 1 / math.sqrt(dim))
        nn.init.uniform_(self.down_proj, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts: [tokens, dim]."""
        return run_module(self, hidden, Routing(weights, index))

    def expert_weights(self) -> ExpertWeights:
        """Return the weights as our expert compute takes them."""
        return ExpertWeights(self.gate_up_proj, self.down_proj, swiglu)


def swiglu(inner: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of ``inner`` [tokens, 2 * width], the gate first."""
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up
