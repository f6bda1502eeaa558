"""Modules that compute with another one's parameters and buffers, but have attributes and flags of their own."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def twin(module: nn.Module) -> nn.Module:
    """Return a module with the same parameters, buffers and hooks, but with attributes of its own at every level.

    A block that its driver hosts finds what user code had set when it was called, as on a worker, not what it sets now.
    """
    return _twin(module, {})


def apart(blocks: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """Return blocks of which no two have a module in common, only parameters and buffers.

    Each is then called with the flags and attributes that it had in this place.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for index, block in blocks.items():
        own = {id(part) for part in block.modules()}
        found[index] = block if seen.isdisjoint(own) else twin(block)
        seen |= own
    return found


def in_common(blocks: Iterable[nn.Module]) -> frozenset[int]:
    """Return the ids of the modules that are in several blocks, or in one that stands in several places."""
    counts = Counter(part for block in blocks for part in {id(part) for part in block.modules()})
    return frozenset(part for part, count in counts.items() if count > 1)


def made_by_hooks(module: nn.Module) -> set[str]:
    """Name the attributes that hooks of torch's make of parameters before each forward: norms of weights, masks."""
    hooks = module._forward_pre_hooks.values()
    named = {hook.name for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}
    return named | {hook._tensor_name for hook in hooks if isinstance(hook, BasePruningMethod)}


def _twin(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in known:
        other = known[id(module)] = type(module).__new__(type(module))
        other.__dict__.update(vars(module))
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            for each in (hooks, f"{hooks}_with_kwargs"):
                other.__dict__[each] = OrderedDict(vars(module)[each])
        other.__dict__["_modules"] = {
            name: None if child is None else _twin(child, known) for name, child in module._modules.items()
        }
    return known[id(module)]
