"""All routers of one process: what they did in the steps that count, and their biases, as plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from skippipe_plugin.moe.attach import RouterHook, RouterStatistics
from skippipe_plugin.moe.balance import BIAS_RULES

PackedStatistics = tuple[Sequence[int], int, int, float, Sequence[float] | None]
"""Loads, tokens, empty slots, entropy and quantiles."""


class RouterBoard:
    """The hooks on the routers of some modules.

    Forwards count only between :meth:`open` and :meth:`close`, which frame a training step, and only if :meth:`commit`
    follows: a probe of a block or a step that was given up leaves nothing behind.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        """Find the hooks; routers whose weights are elsewhere (on the meta device) are left to others."""
        self._routers = {hook.name: (router, hook) for module in modules for router, hook in _hooks(module)}
        self._new: dict[str, RouterStatistics] = {}
        self._totals: dict[str, RouterStatistics] = {}
        self.balances = any(hook.loss_coefficient for _, hook in self._routers.values())
        """Whether a router has a balancing loss."""

    def open(self, loss_scale: float) -> None:
        """Begin a step in which the model's loss of a microbatch is scaled by ``loss_scale``."""
        self._new = {}
        for _, hook in self._routers.values():
            hook.take()
            hook.loss_scale = loss_scale

    def close(self) -> None:
        """End a step: what happened since :meth:`open` counts, once its gradients are added."""
        self._new = {name: hook.take() for name, (_, hook) in self._routers.items()}

    def commit(self) -> None:
        """Let the last step count; one that was interrupted elsewhere is run again, and counts once."""
        new, self._new = self._new, {}
        for name, taken in new.items():
            self._totals[name] = self._totals[name] + taken if name in self._totals else taken

    def take(self) -> dict[str, PackedStatistics]:
        """Return what happened since the last call, by router."""
        totals, self._totals = self._totals, {}
        return {name: pack_statistics(total) for name, total in totals.items()}

    def set_biases(self, biases: Mapping[str, Sequence[float]]) -> None:
        """Set the selection biases of those routers that are here."""
        for name, bias in biases.items():
            if name in self._routers:
                router, hook = self._routers[name]
                hook.set_bias(router, torch.tensor(bias))

    def update_biases(self, loads: Mapping[str, Sequence[int]], rule: str, rate: float) -> None:
        """Update the selection biases by the loads of all replicas."""
        for name, counts in loads.items():
            if name in self._routers:
                self._update(name, rule, rate, torch.tensor(counts))

    def given_biases(self) -> dict[str, list[float]]:
        """Return the biases that the models themselves do not save."""
        hooks = {name: hook for name, (_, hook) in self._routers.items()}
        return {name: hook.given_bias.tolist() for name, hook in hooks.items() if hook.given_bias is not None}

    def _update(self, name: str, rule: str, rate: float, loads: torch.Tensor) -> None:
        router, hook = self._routers[name]
        bias = hook.bias(router)
        before = torch.zeros(hook.num_experts) if bias is None else bias.detach()
        before = before.to(torch.promote_types(before.dtype, torch.float32))
        hook.set_bias(router, BIAS_RULES[rule](before, loads.to(before.device), rate))


def _hooks(module: nn.Module) -> Iterator[tuple[nn.Module, RouterHook]]:
    for router in module.modules():
        for hook in router._forward_hooks.values():
            if isinstance(hook, RouterHook) and not any(map(_is_elsewhere, router.parameters())):
                yield router, hook


def _is_elsewhere(parameter: torch.Tensor) -> bool:
    return parameter.is_meta or hasattr(parameter, "is_remote")


def pack_statistics(statistics: RouterStatistics) -> PackedStatistics:
    """Return the statistics as JSON values."""
    quantiles = None if statistics.quantiles is None else statistics.quantiles.tolist()
    return statistics.loads.tolist(), statistics.num_tokens, statistics.num_empty, statistics.entropy, quantiles


def add_statistics(parts: Iterable[Mapping[str, PackedStatistics]]) -> dict[str, RouterStatistics]:
    """Sum the packed statistics of several processes by router; replicas of a stage add up."""
    totals: dict[str, RouterStatistics] = {}
    for part in parts:
        for name, (loads, num_tokens, num_empty, entropy, quantiles) in part.items():
            measured = None if quantiles is None else torch.tensor(quantiles)
            statistics = RouterStatistics(torch.tensor(loads), num_tokens, num_empty, entropy, measured)
            totals[name] = totals[name] + statistics if name in totals else statistics
    return totals
