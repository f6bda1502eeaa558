"""Settings of the mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skippipe_plugin.checked import COUNT, NUM_PROCESSES, STEP, Range, checked
from skippipe_plugin.moe.rectification import Rectify
from skippipe_plugin.moe.routers import ExpertChoice, GShard, check_capacity_factor, find_router
from skippipe_plugin.moe.routing import Router


@checked(
    expert_parallel=NUM_PROCESSES,
    overlap=Range(1, 1024),
    top_k=COUNT,
    capacity_factor=Range(0, 1_000_000, includes_least=False),
    freeze_after=STEP,
    auxiliary_loss=Range(0, 1_000_000),
)
@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """How the experts of a model are routed and computed.

    >>> MoEConfig(router="sigmoid", capacity_factor=2.0).router
    'sigmoid'
    """

    router: str | Router = "model"
    """``"model"`` keeps the model's own routers; a name of :data:`~skippipe_plugin.moe.ROUTERS` or any callable
    ``(logits, top_k, bias) -> (weights, index)`` chooses from their logits in their place."""
    expert_parallel: int = 1
    """Over how many replicas of a stage its experts are spread; each holds the whole rest and its share of the experts.
    It divides ``replicas``, and the number of experts of every layer."""
    overlap: int | Literal["auto"] = 1
    """Into how many chunks a microbatch's tokens are cut where experts are spread, so that one travels while another is
    computed; ``"auto"`` tries several in the first steps and keeps the fastest (results then differ by rounding)."""
    top_k: int | None = None
    """How many experts a token chooses; None keeps the model's number."""
    capacity_factor: float | None = None
    """How many times its even share an expert takes; later tokens are dropped beyond it. None drops no token."""
    rectify: Rectify | None = None
    """What becomes of what a limited capacity wastes (Rectify-Router, arXiv 2402.12399): ``"dropped"`` lets dropped
    tokens go to their best expert on the device where they are, ``"padding"`` lets experts with room left take the
    tokens that would choose them next, ``"both"`` does both. See :func:`~skippipe_plugin.moe.rectify`."""
    quantiles: bool = False
    """Whether routers note the bias that quantile balancing takes from each microbatch
    (:func:`~skippipe_plugin.moe.quantile_bias`), for ``LoadBalancer`` with ``rule="quantile"``."""
    exact_bias: bool = False
    """Whether a router's own selection bias is kept in float32 whatever the precision of the model, so that small steps
    of it are not lost; ``LoadBalancer(experts="bias")`` turns it on."""
    freeze_after: int | None = None
    """The optimizer step from which the routers' weights do not change any more, as in the second stage of StableMoE
    (arXiv 2204.08396). What is frozen is the model's router, which reads hidden states: as those change, tokens still
    move between experts, only less. The paper freezes another router, distilled in its first stage, that reads word
    embeddings alone; its weights would be new parameters of the model, and no block is given token ids."""
    experts: Literal["auto", "model"] = "auto"
    """``"auto"`` computes the experts of transformers our way, ``"model"`` leaves them as they are."""
    auxiliary_loss: float = 0.0
    """Times the load-balancing loss of each router that is added to the model's gradient, on the statistics of all
    microbatches of the step so far; the model's own auxiliary loss is not touched. 0.01 is common."""
    causal: bool = True
    """Whether no token may depend on a later one; routers that break this are warned about."""

    def __post_init__(self) -> None:
        if self.capacity_factor is not None:
            check_capacity_factor(self.capacity_factor)
        self._check_rectify()
        if self.expert_parallel > 1 and self.experts == "model":
            raise ValueError("experts='model' cannot be spread over replicas; keep experts='auto' for expert_parallel")
        if self.router == "cosine":
            raise ValueError(
                "router='cosine' has parameters of its own, which would change the model's checkpoints; use it with "
                "MoELayer(router='cosine')"
            )
        router = None if self.router == "model" else find_router(self.router)
        leaves_empty = self.capacity_factor is not None or isinstance(router, (GShard, ExpertChoice))
        if self.experts == "model" and leaves_empty:
            raise ValueError(
                "experts='model' cannot leave slots empty, which the experts of transformers do not all allow; "
                "keep experts='auto', or drop no tokens"
            )

    @property
    def fills_padding(self) -> bool:
        """Whether a token may get one slot more, in an expert that has room left."""
        return self.rectify in ("padding", "both")

    def _check_rectify(self) -> None:
        if self.rectify is None:
            return
        if self.capacity_factor is None:
            raise ValueError(f"rectify={self.rectify!r} has no effect without a capacity_factor, which drops no token")
        if self.router != "model" and isinstance(find_router(self.router), (GShard, ExpertChoice)):
            raise ValueError(
                f"rectify={self.rectify!r} knows what capacity_factor drops, and the router {self.router!r} has a "
                "limit of its own; use router='softmax' with capacity_factor"
            )
