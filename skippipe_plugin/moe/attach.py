"""Watch and steer the routers of a model without changing it: a forward hook on each router instance.

Classes, parameter names and state dicts stay the model's. The hooks travel with the blocks when they are pickled.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from skippipe_plugin.moe.balance import add_balancing_gradient, quantile_bias, spread_null_loads
from skippipe_plugin.moe.config import MoEConfig
from skippipe_plugin.moe.families import RouterSite, find_routers, find_unknown
from skippipe_plugin.moe.parallel import IMPLEMENTATION, SHARD, Company, Shard, run_module
from skippipe_plugin.moe.precision import widen_biases
from skippipe_plugin.moe.rectification import rectify
from skippipe_plugin.moe.routers import Sigmoid, Softmax, find_router, scores_of
from skippipe_plugin.moe.routing import (
    Router,
    Routing,
    check_logits,
    count_loads,
    expert_capacity,
    limit_capacity,
    num_null,
    route,
    warn_unless_causal,
)
from skippipe_plugin.moe.tally import Tally

_log = logging.getLogger(__name__)
_MAX_REMEMBERED = 256


@dataclass(slots=True)
class RouterStatistics:
    """What a router did since it was last asked, over all microbatches that trained through it."""

    loads: Tensor
    """[experts], int64: how many tokens visited each expert."""
    num_tokens: int = 0
    num_empty: int = 0
    """Slots without an expert: null experts and dropped tokens."""
    entropy: float = 0.0
    """The sum over tokens of the entropy, in nats, of a softmax over the logits."""
    quantiles: Tensor | None = None
    """[experts]: the sum over tokens of the bias that quantile balancing takes from their microbatch."""

    def __add__(self, other: RouterStatistics) -> RouterStatistics:
        """Add up what two replicas or two steps saw."""
        return RouterStatistics(
            self.loads + other.loads,
            self.num_tokens + other.num_tokens,
            self.num_empty + other.num_empty,
            self.entropy + other.entropy,
            other.quantiles if self.quantiles is None or other.quantiles is None else self.quantiles + other.quantiles,
        )


class RouterHook:
    """The forward hook of one router: counts, and where asked chooses in the router's place."""

    def __init__(self, name: str, site: RouterSite, config: MoEConfig) -> None:
        """Prepare for the router called ``name``; nothing is registered yet."""
        self.name = name
        self.num_experts = site.num_experts
        self.top_k = config.top_k or site.top_k
        self.rule: Router | None = site.rule if config.router == "model" else find_router(config.router)
        self.capacity_factor = config.capacity_factor
        self._rectify, self._fills = config.rectify, config.fills_padding
        self._experts = site.experts
        self._quantiles = config.quantiles
        self.loss_coefficient = config.auxiliary_loss
        """Times the load-balancing loss of each microbatch is added to the model's gradient."""
        self.loss_scale = 1.0
        """What the model's own loss of a microbatch is multiplied by before its backward."""
        self.company: Company | None = None
        """The ranks whose tokens count for the auxiliary loss too, where experts are spread and no tally counts."""
        self.tally: Tally | None = None
        """What counts visits in a training step; without it a call's own are those of the step."""
        self._num_null = 0 if self.rule is None else num_null(self.rule)
        self._replaces = config.router != "model" or self.top_k != site.top_k
        self._bias_name = site.bias
        self._bias: Tensor | None = None
        self._statistics = self._empty()
        self._remembered: deque[tuple[Tensor, Tensor]] | None = None
        self._handle: RemovableHandle | None = None
        self._check(site)

    def _check(self, site: RouterSite) -> None:
        if self._replaces and self.rule is None:
            raise ValueError(
                f"the rule of {self.name} ({type(site.router).__name__}) is not known, so its top_k cannot change; "
                "name a router, or register the family with its rule"
            )
        if self._replaces and site.rule is not None and num_null(site.rule):
            raise ValueError(f"{self.name} has null experts, which its own router {site.rule} knows; leave it that one")
        if self._replaces and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is out of range for {self.name}; it is at least 1 and at most {self.num_experts}"
            )
        if self._quantiles and not self._has_quantiles():
            raise ValueError(
                f"quantile balancing needs a router that adds its bias to all experts' scores, with top_k below the "
                f"number of experts; {self.name} has {self.rule} with top_k={self.top_k} of {self.num_experts}"
            )
        if self._fills and self._closes():
            raise ValueError(
                f"rectify={self._rectify!r} would offer tokens to groups of experts that the router {self.name} has "
                "closed to them; use rectify='dropped'"
            )
        if self._replaces and self.rule is not None and num_null(self.rule):
            raise ValueError(
                f"the router {self.rule} needs logits of its own for null experts, and {self.name} has none: new "
                "parameters would change the model's checkpoints. Use it with MoELayer"
            )

    def _has_quantiles(self) -> bool:
        """Tell whether the router's choice is the best ``scores + bias`` of all experts."""
        return isinstance(self.rule, (Softmax, Sigmoid)) and not self._closes() and self.top_k < self.num_experts

    def _closes(self) -> bool:
        """Tell whether the router closes groups of experts to a token."""
        return isinstance(self.rule, Sigmoid) and self.rule.top_groups < self.rule.num_groups

    # ------------------------------------------------------------ the hook

    def register(self, router: nn.Module) -> None:
        """Begin to listen to ``router``."""
        self._handle = router.register_forward_hook(self)

    def remove(self) -> None:
        """Stop listening."""
        if self._handle is not None:
            self._handle.remove()

    def __call__(self, router: nn.Module, args: Any, output: Any) -> Any:  # Any: what hooks get, and return
        """Return the router's output with our choice in place of its own."""
        logits, *given = output
        chosen, routing = self._route(router, logits, Routing(*given[:2]))
        balances = self.loss_coefficient > 0 and router.training
        if _recomputes():
            routing = self._replay(logits, routing)
        elif router.training:
            loads = count_loads(routing.experts, self.num_experts).cpu()
            self._count(router, logits, routing, loads)
            self._remember(logits, routing)
            if balances and self.tally is not None:
                self.tally.note(self.name, torch.cat([loads, self._count_null(chosen)]))
        if balances and logits.requires_grad:
            routing = self._with_loss(logits, routing, chosen)
        return (logits, routing.weights, routing.experts, *given[2:])

    def _route(self, router: nn.Module, logits: Tensor, own: Routing) -> tuple[Routing, Routing]:
        """Return what the tokens chose, and what a limit on capacity leaves of it."""
        if self._replaces or self._bias is not None:
            assert self.rule is not None, "checked when the hook was made and when the bias was set"
            bias = self.bias(router)
            routing = route(self.rule, logits, self.top_k, bias, where=self.name)
            routing = Routing(routing.weights.to(own.weights.dtype), routing.experts)
        else:
            check_logits(logits, self.name)
            routing = own
        if self.capacity_factor is None:
            return routing, routing
        capacity = expert_capacity(len(logits), self.top_k, self.num_experts, self.capacity_factor)
        limited = limit_capacity(routing, self.num_experts, capacity)
        if self._rectify is None:
            return routing, limited
        shard: Shard | None = getattr(self._experts, SHARD, None)
        here = None if shard is None else shard.is_here().to(logits.device)
        scores = self.rule.scores if isinstance(self.rule, (Softmax, Sigmoid)) else lambda x: scores_of(x).softmax(-1)
        own_scores, bias = scores(logits)[:, : self.num_experts], self.bias(router)
        return routing, rectify(routing, limited, own_scores, capacity, self._rectify, bias=bias, here=here)

    # ------------------------------------------------------------ the bias

    def bias(self, router: nn.Module) -> Tensor | None:
        """Return the router's selection bias, its own or the one that was set here: [experts]."""
        if self._bias_name is not None:
            bias: Tensor = getattr(router, self._bias_name)
            return bias[: self.num_experts]  # after them come those of null experts
        return self._bias

    @property
    def given_bias(self) -> Tensor | None:
        """The bias that was set here because the model has none of its own to save it in: [experts]."""
        return self._bias

    def set_bias(self, router: nn.Module, bias: Tensor) -> None:
        """Write the router's own selection bias; give one to a router that has none.

        Raises:
            ValueError: The shape is wrong, or the router has no bias and its rule is not known.
        """
        if bias.shape != (self.num_experts,):
            raise ValueError(f"a bias {tuple(bias.shape)} does not fit the {self.num_experts} experts of {self.name}")
        if self._bias_name is not None:
            with torch.no_grad():
                getattr(router, self._bias_name)[: self.num_experts].copy_(bias)
        elif self.rule is None:
            raise ValueError(
                f"{self.name} ({type(router).__name__}) has no selection bias and its rule is not known, so no bias "
                "can move its choice; name a router in MoEConfig, or register the family with its rule"
            )
        else:
            device = next((parameter.device for parameter in router.parameters()), bias.device)
            self._bias = bias.detach().to(device)

    # ------------------------------------------------------- what happened

    def take(self) -> RouterStatistics:
        """Return what happened since the last call, and begin anew."""
        taken, self._statistics = self._statistics, self._empty()
        if self._remembered is not None:
            self._remembered.clear()
        return taken

    def _empty(self) -> RouterStatistics:
        return RouterStatistics(torch.zeros(self.num_experts, dtype=torch.int64))

    @torch.no_grad()
    def _count(self, router: nn.Module, logits: Tensor, routing: Routing, loads: Tensor) -> None:
        log_scores = logits.detach().float().log_softmax(-1)
        filled = (routing.experts < self.num_experts).sum(-1)
        self._statistics += RouterStatistics(
            loads,
            len(logits),
            int((routing.experts.shape[1] - self._fills - filled).clamp(min=0).sum()),
            float(-(log_scores.exp() * log_scores).sum()),
            self._count_quantiles(router, logits) if self._quantiles else None,
        )

    def _count_null(self, chosen: Routing) -> Tensor:
        """Return how often null experts were chosen, where there are any: [1] or [0]; dropped tokens do not count."""
        empty = (chosen.experts == self.num_experts).sum() if self._num_null else torch.zeros(0, dtype=torch.int64)
        return empty.reshape(-1).cpu()

    @property
    def width(self) -> int:
        """How many counts the balancing loss needs: of each expert and, where there are any, of all null experts."""
        return self.num_experts + (self._num_null > 0)

    def _visits_alone(self, routing: Routing, chosen: Routing) -> Tensor:
        """Return the visits of this call, and of the ranks that run it at the same time."""
        total = torch.cat([count_loads(routing.experts, self.num_experts).cpu(), self._count_null(chosen)])
        if self.company is not None and self.company.is_met and not _recomputes():
            self.company.sum(total)
        return total

    def _count_quantiles(self, router: nn.Module, logits: Tensor) -> Tensor:
        assert isinstance(self.rule, (Softmax, Sigmoid)), "checked when the hook was made"
        scores, bias = self.rule.scores(logits), self.bias(router)
        before = scores.new_zeros(self.num_experts) if bias is None else bias.to(scores)
        return len(logits) * quantile_bias(scores, self.top_k, before).cpu()

    # ------------------------------------------------------- recomputation

    def _remember(self, logits: Tensor, routing: Routing) -> None:
        if self._remembered is not None:
            self._remembered.append((logits.detach(), routing.experts))

    @torch.no_grad()  # what autograd saved here would be one tensor too many for the checkpoint
    def _replay(self, logits: Tensor, routing: Routing) -> Routing:
        """Choose as the first forward did: a near tie that falls otherwise changes the shapes that autograd saved.

        The first forward is the one with the closest logits. Selections are kept from the first recomputation on.
        """
        if self._remembered is None:
            self._remembered = deque(maxlen=_MAX_REMEMBERED)
        fitting = [entry for entry in self._remembered if entry[0].shape == logits.shape]
        if not fitting:
            return routing
        entry = min(fitting, key=lambda entry: float((entry[0] - logits).abs().max()))
        if not torch.allclose(entry[0], logits, rtol=1e-2, atol=1e-3):
            return routing
        self._remembered = deque((e for e in self._remembered if e is not entry), maxlen=_MAX_REMEMBERED)
        return Routing(routing.weights, entry[1])

    # ------------------------------------------------------- auxiliary loss

    def _with_loss(self, logits: Tensor, routing: Routing, chosen: Routing) -> Routing:
        """Add the gradient of the balancing loss on the visits so far in the step; on its own outside of steps."""
        if self.tally is None:
            find = functools.partial(_same, self._visits_alone(routing, chosen))
        else:
            find = functools.partial(self.tally.loads, self.name, self.tally.current)
        scale = self.loss_coefficient * self.loss_scale
        weights = add_balancing_gradient(
            routing.weights,
            logits.softmax(-1),
            lambda: spread_null_loads(find(), self.num_experts, self._num_null),
            scale,
        )
        return Routing(weights, routing.experts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, where our expert compute may not be known yet."""
        self.__dict__.update(state)
        _register_implementation()


def _same(value: Tensor) -> Tensor:
    return value


def _recomputes() -> bool:
    """Tell whether this forward runs inside a backward, as activation checkpointing does."""
    return torch._C._current_graph_task_id() != -1


# ------------------------------------------------------------ whole models


@dataclass(frozen=True, slots=True)
class Attached:
    """The hooks on a model's routers, by the routers' names."""

    hooks: dict[str, RouterHook]
    routers: dict[str, nn.Module]
    implementations: tuple[tuple[Any, str | None], ...]  # Any: a config of transformers
    freeze_after: int | None = None

    def begin_step(self, step: int) -> None:
        """Note that optimizer step ``step`` begins; the routers are frozen from ``freeze_after`` on."""
        if self.freeze_after is not None and step >= self.freeze_after:
            freeze_routers(self.routers.values())

    def detach(self) -> None:
        """Leave the model as it was found."""
        for hook in self.hooks.values():
            hook.remove()
        for config, implementation in self.implementations:
            config._experts_implementation = implementation


def attach(model: nn.Module, config: MoEConfig | None = None) -> Attached:
    """Watch, and as ``config`` says steer, every router of ``model`` that is recognised.

    What looks like experts but is not recognised stays untouched and is listed in one warning of the log.

    Raises:
        ValueError: Nothing is recognised, or the config does not fit a router.
    """
    config = config or MoEConfig()
    sites = find_routers(model)
    unknown = find_unknown(model)
    if unknown:
        _log.warning("experts of unknown families run as they are: %s", ", ".join(unknown))
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no mixture of experts of a known family"
            + (f" (but {', '.join(unknown)})" if unknown else "")
            + "; leave moe out, use MoELayer, or add the family with skippipe_plugin.moe.register_family"
        )
    if config.exact_bias:
        widen_biases(sites.values())
    hooks = {name: RouterHook(name, site, config) for name, site in sites.items()}
    if config.causal and config.router != "model":
        warn_unless_causal(find_router(config.router))
    if config.causal and config.fills_padding:
        warnings.warn(
            f"rectify={config.rectify!r} gives tokens the room that later ones leave: a causal language model leaks "
            "the future through it. Choose rectify='dropped', or say causal=False",
            stacklevel=2,
        )
    for name, site in sites.items():
        hooks[name].register(site.router)
    routers = {name: site.router for name, site in sites.items()}
    return Attached(hooks, routers, _set_implementation(sites, config), config.freeze_after)


def freeze_routers(routers: Iterable[nn.Module]) -> None:
    """Stop training routers: their parameters need no gradient any more, and optimizers pass them by."""
    for router in routers:
        for parameter in router.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def _set_implementation(sites: dict[str, RouterSite], config: MoEConfig) -> tuple[tuple[Any, str | None], ...]:
    """Let the experts of transformers compute our way; return what their configs said before."""
    configs = {id(c): c for site in sites.values() if (c := getattr(site.experts, "config", None)) is not None}
    if config.experts == "model" or not configs:
        return ()
    _register_implementation()
    before = tuple((each, each._experts_implementation) for each in configs.values())
    for each in configs.values():
        each._experts_implementation = IMPLEMENTATION
    return before


def _register_implementation() -> None:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # only models of transformers need it
        return
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, transformers_experts)


def transformers_experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Run an experts module of transformers; ``self`` (Any: each family has its own class) is that module."""
    return run_module(self, hidden, Routing(weights, index))
