"""Experts that are spread over the replicas of a stage, seen from a driver: what goes where, and together again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..engine.control.values import ExpertShare
from ..engine.optimizer import ParameterKey
from ..engine.wire import tensor_key
from ..moe.parallel import Placement
from ..moe.shards import (
    ExpertSite,
    check_divisible,
    even_placement,
    find_sites,
    has_rows,
    join_shards,
    take_shard,
)
from .formation import HasLayout
from .layout import Layout

Site = tuple[int, str]
"""The number of a block, and the name of the experts in it."""
State = Mapping[ParameterKey, Mapping[str, Any]]
"""An optimizer's state by parameter; Any: the optimizer class defines it."""


class ExpertShards:
    """The placements of a pipeline's experts; empty without expert parallelism."""

    def __init__(self, formed: HasLayout) -> None:
        self.placements: dict[Site, Placement] = {}
        """By layer: the position of each expert among the replicas that share them."""
        self.sites: dict[Site, ExpertSite] = {}
        self.overlap: int | str = 1
        """Into how many chunks workers cut the tokens that travel, or "auto"."""
        self._formed = formed
        self._site_of: dict[ParameterKey, Site] = {}

    @property
    def _layout(self) -> Layout:
        return self._formed.layout

    def learn(self, blocks: Sequence[nn.Module]) -> None:
        """Find the experts of the blocks that live on replicas.

        Raises:
            ValueError: They cannot be spread; the message names the layer and the way out.
        """
        size = self._layout.expert_parallel
        for stage, _ in self._layout.expert_sets:
            for block in self._layout.blocks(stage):
                for site in find_sites(blocks[block]):
                    check_divisible(f"{site.path} in block {block}", site.num_experts, size)
                    self.sites[block, site.path] = site
                    self.placements[block, site.path] = even_placement(site.num_experts, size)
                    self._site_of |= dict.fromkeys(((block, name) for name in site.tensors), (block, site.path))

    def check_apart(self, shared: Collection[str]) -> None:
        """Raise when an expert that is spread is among the ``shared`` tensors of blocks, by their names on the wire."""
        for name in shared:
            if tensor_key(name) in self._site_of:
                block, local = tensor_key(name)
                raise ValueError(
                    f"{local} of block {block} is in other blocks or in the rest of the model, too, and experts that "
                    "blocks share cannot be spread over replicas: set expert_parallel=1, or give each block its own"
                )

    def described(self, stage: int, rank: int) -> list[ExpertShare]:
        """Tell a worker which experts of a stage it holds."""
        blocks, position = self._layout.blocks(stage), self._layout.position(rank)
        return [
            (block, path, placement, self.sites[block, path].tensors, position)
            for (block, path), placement in self.placements.items()
            if block in blocks
        ]

    def cut(self, blocks: Mapping[int, nn.Module], rank: int) -> dict[int, Tensor]:
        """Map the ``id`` of each tensor of which ``rank`` holds some rows to these rows."""
        return {
            id(tensor): self.part((block, name), tensor, rank)
            for block, module in blocks.items()
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if (block, name) in self._site_of and not tensor.is_meta
        }

    def part(self, key: ParameterKey, tensor: Tensor, rank: int) -> Tensor:
        """Return what ``rank`` holds of a whole tensor."""
        site = self._site_of.get(key)
        return tensor if site is None else take_shard(tensor, self.placements[site], self._layout.position(rank))

    def part_of_state(self, state: State, rank: int) -> dict[ParameterKey, dict[str, Any]]:
        """Return what belongs to the rows of ``rank`` of an optimizer's state of whole parameters."""
        return {
            key: {
                name: self.part(key, value, rank)
                if key in self._site_of and has_rows(value, self._num_experts(key))
                else value
                for name, value in entries.items()
            }
            for key, entries in state.items()
        }

    def join(self, parts: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Put together what the ranks hold, by ``"<block>\\t<name>"``; what lacks rows is left out."""
        result: dict[str, Tensor] = {}
        pieces: dict[str, dict[int, Tensor]] = {}
        for rank, tensors in parts.items():
            for name, tensor in tensors.items():
                if tensor_key(name) in self._site_of:
                    pieces.setdefault(name, {}).setdefault(self._layout.position(rank), tensor)
                else:
                    result.setdefault(name, tensor)
        for name, shards in pieces.items():
            if len(shards) == self._layout.expert_parallel:
                result[name] = join_shards(shards, self.placements[self._site_of[tensor_key(name)]])
        return result

    def join_states(self, parts: Mapping[int, State]) -> dict[ParameterKey, dict[str, Any]]:
        """Put together the optimizer states of the ranks' parameters."""
        result: dict[ParameterKey, dict[str, Any]] = {}
        pieces: dict[tuple[ParameterKey, str], dict[int, Tensor]] = {}
        for rank, state in parts.items():
            for key, entries in state.items():
                for name, value in entries.items():
                    result.setdefault(key, {}).setdefault(name, value)
                    if key in self._site_of and has_rows(value, self._num_experts(key) // self._layout.expert_parallel):
                        pieces.setdefault((key, name), {})[self._layout.position(rank)] = value
        for (key, name), shards in pieces.items():
            result[key][name] = join_shards(shards, self.placements[self._site_of[key]])
        return result

    def _num_experts(self, key: ParameterKey) -> int:
        return len(self.placements[self._site_of[key]])
