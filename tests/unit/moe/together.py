"""Ranks as threads of one process: an exchange between them, and models whose experts are spread over them."""

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skippipe_plugin.moe import MoEConfig
from skippipe_plugin.moe.attach import RouterHook, attach
from skippipe_plugin.moe.parallel import SHARD, Company, Placement, Shard
from skippipe_plugin.moe.shards import ExpertSite, even_placement, find_sites, join_shards, take_shard

PATIENCE_S = 20.0


class Room:
    """Where the threads meet: rows by the number of the call, and from whom to whom."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int, int], Tensor] = {}
        self.changed = threading.Condition()

    def put(self, key: tuple[int, int, int], rows: Tensor) -> None:
        with self.changed:
            self.rows[key] = rows
            self.changed.notify_all()

    def take(self, key: tuple[int, int, int]) -> Tensor:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.rows, PATIENCE_S), f"nothing came for {key}"
            return self.rows.pop(key)


class ThreadExchange:
    def __init__(self, room: Room, size: int, position: int) -> None:
        self.room, self.size, self.position = room, size, position
        self.calls = 0

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> "Coming":
        number, self.calls = self.calls, self.calls + 1
        for other, part in enumerate(rows.split(list(send))):
            self.room.put((number, self.position, other), part.clone())
        return Coming(self, number, receive)

    def sum(self, tensor: Tensor) -> None:
        parts = tensor.unsqueeze(0).expand(self.size, *tensor.shape)
        tensor.copy_(self.all_to_all(parts, [1] * self.size, [1] * self.size).wait().sum(0))


class Coming:
    def __init__(self, exchange: ThreadExchange, number: int, receive: Sequence[int]) -> None:
        self.exchange, self.number, self.receive = exchange, number, receive

    def wait(self) -> Tensor:
        exchange = self.exchange
        parts = [exchange.room.take((self.number, other, exchange.position)) for other in range(exchange.size)]
        assert [len(part) for part in parts] == list(self.receive)
        return torch.cat(parts)


class Rank:
    """One thread's copy of a model, with its share of the experts."""

    def __init__(
        self, model: nn.Module, room: Room, size: int, position: int, placements: dict[str, Placement]
    ) -> None:
        self.model, self.position = copy.deepcopy(model), position
        self.sites = find_sites(self.model)
        assert self.sites, "nothing to spread"
        modules = [self.model.get_submodule(site.path) for site in self.sites]
        self.company = Company(ThreadExchange(room, size, position), modules)
        self.placements = {
            site.path: placements.get(site.path, even_placement(site.num_experts, size)) for site in self.sites
        }
        for number, (site, module) in enumerate(zip(self.sites, modules, strict=True)):
            placement = self.placements[site.path]
            for name in site.tensors:
                tensor = self.model.get_parameter(name)
                tensor.data = take_shard(tensor, placement, position)
            setattr(module, SHARD, Shard(self.company, number, placement))
        for hook in {hook for module in self.model.modules() for hook in module._forward_hooks.values()}:
            if isinstance(hook, RouterHook):
                hook.company = self.company

    def site_of(self, parameter: str) -> ExpertSite | None:
        return next((site for site in self.sites if parameter in site.tensors), None)


def spread(
    model: nn.Module, size: int, placements: dict[str, Placement] | None = None, config: MoEConfig | None = None
) -> list[Rank]:
    """Copy a model for several ranks; the original is left attached, so that it computes our way too."""
    attach(model, config)
    room = Room()
    return [Rank(model, room, size, position, placements or {}) for position in range(size)]


def run_together(ranks: Sequence[Rank], work: Callable[[Rank], Any]) -> list[Any]:
    """Let every rank work in a thread of its own; return what they return, or raise the first error."""
    results: list[Any] = [None] * len(ranks)
    errors: list[BaseException] = []

    def run(rank: Rank) -> None:
        try:
            results[rank.position] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def gradients(ranks: Sequence[Rank]) -> dict[str, Tensor]:
    """Return the gradients of the whole model: dense parts summed over ranks, experts put together."""
    result = {}
    for name, _ in ranks[0].model.named_parameters():
        parts = {rank.position: rank.model.get_parameter(name).grad for rank in ranks}
        site = ranks[0].site_of(name)
        if site is not None:
            assert all(part is not None for part in parts.values()), f"{name} has no gradient on some rank"
            result[name] = join_shards(parts, ranks[0].placements[site.path])
        else:
            present = [part for part in parts.values() if part is not None]
            if present:
                result[name] = torch.stack(present).sum(0)
    return result
