"""Which modules of a model are mixtures of experts: one small function per family."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from skippipe_plugin.moe.layer import MoELayer
from skippipe_plugin.moe.routers import Sigmoid, Softmax
from skippipe_plugin.moe.routing import Router


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSite:
    """A router of the model, and the experts that it sends tokens to.

    The router is a module that returns ``(logits [tokens, experts], weights [tokens, slots], index [tokens, slots])``,
    maybe with more after them.
    """

    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int
    rule: Router | None = None
    """A router of ours that does the same on its logits. Without it the router's choice can be watched, limited or
    replaced, but not moved by a bias."""
    bias: str | None = None
    """The name of the router's own selection bias, if it has one."""


Family = Callable[[nn.Module], Sequence[RouterSite]]
"""Returns the routers of a module if it is a block of the family, and nothing otherwise."""


def own_layer(module: nn.Module) -> Sequence[RouterSite]:
    """Recognise :class:`~skippipe_plugin.moe.MoELayer`."""
    if not isinstance(module, MoELayer):
        return ()
    return [
        RouterSite(
            router=router,
            experts=module.experts,
            num_experts=router.num_experts,
            top_k=router.top_k,
            rule=router.rule,
            bias="selection_bias",
        )
        for router in module.own_routers()
    ]


def transformers_block(module: nn.Module) -> Sequence[RouterSite]:
    """Recognise the blocks of transformers whose experts take an experts implementation, and their routers."""
    experts, router = getattr(module, "experts", None), _router_of(module)
    if not isinstance(experts, nn.Module) or router is None or not _takes_implementation(experts):
        return ()
    weight = getattr(router, "weight", None)
    top_k, num_experts = getattr(router, "top_k", None), getattr(experts, "num_experts", None)
    if not isinstance(weight, torch.Tensor) or not isinstance(top_k, int) or not isinstance(num_experts, int):
        return ()
    if not _returns_a_routing(router, weight, num_experts):
        return ()
    rule = _RULES.get(type(router).__name__)
    return [
        RouterSite(
            router=router,
            experts=experts,
            num_experts=num_experts,
            top_k=top_k,
            rule=rule(router) if rule else None,
            bias=_own_bias(router, num_experts),
        )
    ]


def _router_of(module: nn.Module) -> nn.Module | None:
    named = (getattr(module, name, None) for name in ("gate", "router"))
    return next((each for each in named if isinstance(each, nn.Module)), None)


def _takes_implementation(experts: nn.Module) -> bool:
    """Tell whether the experts' class was decorated with ``use_experts_implementation``."""
    return all(hasattr(experts, name) for name in ("_apply_gate", "_is_expert_parallel", "is_transposed", "config"))


def _returns_a_routing(router: nn.Module, weight: torch.Tensor, num_experts: int) -> bool:
    """Ask the router about two tokens, on the meta device: no memory, no randomness, no trace in buffers."""
    tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    hidden = torch.empty(2, weight.shape[-1], dtype=weight.dtype, device="meta")
    bare = copy.copy(router)
    bare._forward_hooks = OrderedDict()  # ours, if it has one, looks at values
    try:
        with torch.no_grad():
            answer = torch.func.functional_call(bare, on_meta, (hidden,))
    except (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError, KeyError, AttributeError):
        return False
    if not isinstance(answer, tuple) or len(answer) < 3 or any(not torch.is_tensor(each) for each in answer[:3]):
        return False
    logits, weights, index = answer[:3]
    return bool(logits.shape == (2, num_experts) and weights.shape == index.shape and index.dtype == torch.int64)


def _own_bias(router: nn.Module, num_experts: int) -> str | None:
    for name in ("e_score_correction_bias", "expert_bias"):
        bias = getattr(router, name, None)
        if isinstance(bias, torch.Tensor) and bias.shape == (num_experts,):
            return name
    return None


def _softmax(router: nn.Module) -> Router:
    return Softmax(renormalise=bool(getattr(router, "norm_topk_prob", True)))


def _deepseek_v3(router: nn.Module) -> Router:
    return Sigmoid(
        renormalise=bool(router.norm_topk_prob),
        scale=float(router.routed_scaling_factor),  # type: ignore[arg-type]
        num_groups=int(router.num_group),  # type: ignore[arg-type]
        top_groups=int(router.topk_group),  # type: ignore[arg-type]
    )


_RULES: dict[str, Callable[[nn.Module], Router]] = {
    "MixtralTopKRouter": _softmax,
    "Qwen2MoeTopKRouter": _softmax,
    "Qwen3MoeTopKRouter": _softmax,
    "OlmoeTopKRouter": _softmax,
    "GraniteMoeTopKRouter": _softmax,
    "GptOssTopKRouter": _softmax,
    "DeepseekV3TopkRouter": _deepseek_v3,
}
_FAMILIES: list[Family] = [own_layer, transformers_block]


def register_family(family: Family) -> Family:
    """Add a family; it is asked before those that are known. Usable as a decorator.

    >>> from torch import nn
    >>> class MyBlock(nn.Module): ...  # with a router that returns (logits, weights, index), and experts
    >>> @register_family  # doctest: +SKIP
    ... def my_family(module):
    ...     if not isinstance(module, MyBlock):
    ...         return []
    ...     return [RouterSite(router=module.router, experts=module.experts, num_experts=8, top_k=2)]
    """
    _FAMILIES.insert(0, family)
    return family


def find_routers(model: nn.Module) -> dict[str, RouterSite]:
    """Return the routers of ``model`` by their names in it, in order."""
    names = {module: name for name, module in model.named_modules()}
    return {names[site.router]: site for module in names for site in _sites(module)}


def find_unknown(model: nn.Module) -> list[str]:
    """Name the modules that have experts but belong to no known family: ``"layers.1.mlp (DbrxFFN)"``."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module) and not _sites(module)
    ]


def _sites(module: nn.Module) -> Sequence[RouterSite]:
    found: Iterator[Sequence[RouterSite]] = (family(module) for family in _FAMILIES)
    return next((sites for sites in found if sites), ())
