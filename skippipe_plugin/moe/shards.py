"""Which tensors of a model are its experts', and how they are cut into shards and put together again.

A shard holds the rows of its own experts, in ascending order, of every tensor that has one row for each expert.
Parameters keep their names, so a state dict is that of the model once the rows are together again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skippipe_plugin.moe.families import RouterSite, find_routers
from skippipe_plugin.moe.parallel import Placement, computes_our_way


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """The experts of one layer, by their place in a block."""

    path: str
    """The name of the experts module in the block."""
    num_experts: int
    routers: tuple[str, ...]
    """The names in the block of the routers that choose among them."""
    tensors: tuple[str, ...]
    """The names in the block of the parameters and buffers with a row for each expert."""


def find_sites(block: nn.Module) -> list[ExpertSite]:
    """Return the experts of a block that can be spread over ranks, in order."""
    names = {id(module): name for name, module in block.named_modules()}
    by_experts: dict[int, list[tuple[str, RouterSite]]] = {}
    for router, site in find_routers(block).items():
        by_experts.setdefault(id(site.experts), []).append((router, site))
    sites = []
    for key, found in by_experts.items():
        site = found[0][1]
        path = names[key]
        if not computes_our_way(site.experts):
            raise ValueError(
                f"the experts {path} ({type(site.experts).__name__}) compute in a way of their own, so they cannot be "
                "spread over replicas; use experts of transformers or MoELayer, or expert_parallel=1"
            )
        own = [*site.experts.named_parameters(recurse=False), *site.experts.named_buffers(recurse=False)]
        tensors = tuple(f"{path}.{name}" for name, tensor in own if tensor.dim() and len(tensor) == site.num_experts)
        sites.append(ExpertSite(path, site.num_experts, tuple(router for router, _ in found), tensors))
    return sites


def even_placement(num_experts: int, size: int) -> Placement:
    """Return the placement that every run begins with: experts in order, as many on each rank.

    >>> even_placement(4, 2)
    (0, 0, 1, 1)
    """
    return tuple(expert * size // num_experts for expert in range(num_experts))


def check_divisible(name: str, num_experts: int, size: int) -> None:
    """Raise a ValueError when the experts of a layer cannot be dealt evenly."""
    if num_experts % size:
        fitting = [each for each in range(2, num_experts + 1) if num_experts % each == 0]
        raise ValueError(
            f"the {num_experts} experts of {name} do not divide by expert_parallel={size}; choose one of "
            f"{', '.join(map(str, fitting))}, or 1"
        )


def rows_of(placement: Placement, position: int) -> list[int]:
    """Return the experts at a position, in the order of its rows."""
    return [expert for expert, place in enumerate(placement) if place == position]


def take_shard(tensor: Tensor, placement: Placement, position: int) -> Tensor:
    """Return a position's rows of a tensor with a row for each expert."""
    return tensor.detach()[torch.tensor(rows_of(placement, position), device=tensor.device)]


def join_shards(shards: Mapping[int, Tensor], placement: Placement) -> Tensor:
    """Put the shards of all positions together: the inverse of :func:`take_shard`."""
    first = next(iter(shards.values()))
    whole = first.new_empty(len(placement), *first.shape[1:])
    for position, shard in shards.items():
        whole[torch.tensor(rows_of(placement, position))] = shard
    return whole


def has_rows(tensor: object, num_rows: int) -> bool:
    """Tell whether an entry of an optimizer's state belongs to rows as its parameter does, and not to all of it."""
    return isinstance(tensor, Tensor) and tensor.dim() > 0 and len(tensor) == num_rows


def moves(before: Placement, after: Placement, position: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return which experts a position sends to each other one and gets from each, when a placement changes."""
    size = 1 + max(before)
    send = [[e for e in rows_of(before, position) if after[e] == other] for other in range(size)]
    receive = [[e for e in rows_of(after, position) if before[e] == other] for other in range(size)]
    return send, receive


def moved_rows(
    sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]], before: Placement, after: Placement, position: int
) -> tuple[Tensor, Tensor]:
    """Return the rows to send, in order, and where the rows that come belong: both are numbers of rows of a shard."""
    old = {expert: row for row, expert in enumerate(rows_of(before, position))}
    new = {expert: row for row, expert in enumerate(rows_of(after, position))}
    leave = torch.tensor([old[expert] for group in sent for expert in group], dtype=torch.int64)
    arrive = torch.tensor([new[expert] for group in received for expert in group], dtype=torch.int64)
    return leave, arrive
