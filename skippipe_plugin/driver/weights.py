"""The weights of blocks that live on workers: fetched, overwritten, brought back into the driver's model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..engine.handover import pack_tensors, unpack_tensors
from ..engine.wire import block_tensors, tensor_key
from .capture.remote import detach, reattach
from .layout import Layout
from .links import Link, Links
from .shards import ExpertShards


class RemoteWeights:
    """Parameters and buffers of the blocks that a driver's model has as meta tensors, by ``"<block>\\t<name>"``.

    Args:
        links: To the workers that hold them.
        layout: Which worker holds which block.
        rank: This driver's rank; what it holds itself is not remote.
        shards: Which worker holds which experts.
    """

    def __init__(self, links: Links, layout: Layout, rank: int, shards: ExpertShards) -> None:
        self._links = links
        self.layout = layout
        self._shards = shards
        self._hosted = set(layout.hosted(rank))
        self._blocks: Sequence[nn.Module] = ()
        self._sizes: Sequence[int] = ()

    def own(self, blocks: Sequence[nn.Module]) -> None:
        """Take charge of a block stack, whose remote tensors lose their values here."""
        self._blocks = blocks
        self._sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
        for _, block in self._remote():
            for tensor in dict.fromkeys((*block.parameters(), *block.buffers())):
                detach(tensor)

    def parameters(self) -> dict[int, tuple[int, str]]:
        """Map the ``id`` of each remote parameter to its (block, name)."""
        return {
            id(parameter): (index, name)
            for index, block in self._remote()
            for name, parameter in block.named_parameters()
        }

    def block_bytes(self) -> Sequence[int]:
        """Return by block how many bytes its parameters take."""
        return self._sizes

    def names(self) -> list[str]:
        """Name what :meth:`fetch` returns."""
        return list(block_tensors(dict(self._remote())))

    def fetch(self) -> dict[str, Tensor]:
        """Fetch everything, each stage from the first worker that holds it."""
        parts: dict[int, dict[str, Tensor]] = {}
        for link in self.first_holders():
            message = link.ask("get", {"what": "weights"}, "state")
            parts[link.rank] = unpack_tensors(message.fields["tensors"], message.blobs)
        return self._shards.join(parts)

    def salvage(self) -> dict[str, Tensor]:
        """Fetch what the survivors of a lost worker hold."""
        parts: dict[int, dict[str, Tensor]] = {}
        for link in self._links:
            message = link.salvage("get", {"what": "weights"}, "state")
            if message is not None:
                parts[link.rank] = unpack_tensors(message.fields["tensors"], message.blobs)
        return self._shards.join(parts)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; the workers answer "ready"."""
        for link in self._links:
            blocks = set(self.layout.hosted(link.rank))
            own = {
                name: self._shards.part(key, tensor, link.rank)
                for name, tensor in tensors.items()
                if (key := tensor_key(name))[0] in blocks
            }
            entries, blobs = pack_tensors(own)
            link.send("put", {"what": "weights", "tensors": entries}, blobs)

    def give_back(self, weights: Mapping[str, Tensor]) -> list[int]:
        """Put values into the driver's model again, NaN where there are none; return the blocks that lack some."""
        lost: list[int] = []
        for name, tensor in block_tensors(dict(self._remote())).items():
            value = weights.get(name)
            if value is None:
                value = torch.full(tensor.shape, float("nan")).to(tensor.dtype)
                lost.append(tensor_key(name)[0])
            reattach(tensor, value)
        self._blocks = ()
        return list(dict.fromkeys(lost))

    def first_holders(self) -> Iterator[Link]:
        """Return for each remote stage links to workers that hold all of it together: one, or those of its experts."""
        for stage in range(1, len(self.layout.placement)):
            for rank in self.layout.whole_set(stage, self._links):
                yield self._links[rank]

    def _remote(self) -> Iterable[tuple[int, nn.Module]]:
        return ((index, block) for index, block in enumerate(self._blocks) if index not in self._hosted)
