"""The weights of blocks that live on workers: fetched, overwritten, brought back into the driver's model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..engine import phases
from ..engine.control.answers import State
from ..engine.control.commands import Get
from ..engine.device_errors import is_lasting
from ..engine.errors import SkipPipeError
from ..engine.handover import unpack_tensors
from ..engine.wire import tensor_key
from .formation import HasLayout
from .layout import Layout
from .links import Link, Links
from .mirrored import Host, Mirror
from .shards import ExpertShards


class RemoteWeights:
    """Parameters and buffers of the blocks that a driver's model has without values, by ``"<block>\\t<name>"``.

    Args:
        links: To the workers that hold them.
        formed: Knows which worker holds which block.
        rank: This driver's rank; what it holds itself is not remote.
        shards: Which worker holds which experts.
        mirror: What user code sees of them.
    """

    def __init__(self, links: Links, formed: HasLayout, rank: int, shards: ExpertShards, mirror: Mirror) -> None:
        self._links = links
        self._formed = formed
        self._shards = shards
        self._mirror = mirror
        self._hosted = set(formed.layout.hosted(rank))
        self._sizes: Sequence[int] = ()

    @property
    def _layout(self) -> Layout:
        return self._formed.layout

    def remote_of(self, blocks: Sequence[nn.Module]) -> dict[int, nn.Module]:
        """Return those of all blocks that workers hold."""
        return {index: block for index, block in enumerate(blocks) if index not in self._hosted}

    def own(self, blocks: Sequence[nn.Module], names: Sequence[str]) -> None:
        """Take charge of a block stack, whose remote tensors lose their values here."""
        self._sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
        self._mirror.own(self.remote_of(blocks), names)

    def parameters(self, *, needing_gradients: bool = False) -> dict[int, tuple[int, str]]:
        """Map the ``id`` of each remote parameter (that needs a gradient) to its (block, name)."""
        named = [(name, each) for name, each in self._mirror.named().items() if isinstance(each, nn.Parameter)]
        return {id(each): tensor_key(name) for name, each in named if each.requires_grad or not needing_gradients}

    def block_bytes(self) -> Sequence[int]:
        """Return by block how many bytes its parameters take."""
        return self._sizes

    def last(self, host: Host) -> dict[str, Tensor]:
        """Fetch everything, or what can be had after a loss."""

        phases.reach(phases.Phase.ENDING)

        def fetch() -> dict[str, Tensor]:
            host.heal()
            return self.fetch()

        if not host.beyond_help:
            try:
                return host.surviving(fetch)
            except SkipPipeError:
                if not self._links.lost:
                    raise
            except Exception as error:
                if not is_lasting(error):  # else who has met it cannot send what it holds
                    raise
        return self.salvage()

    def fetch(self) -> dict[str, Tensor]:
        """Fetch everything, each stage from the first worker that holds it."""
        parts: dict[int, dict[str, Tensor]] = {}
        for link in self.first_holders():
            state = link.ask(Get("weights"), State)
            parts[link.rank] = unpack_tensors(state.tensors, state.blobs)
        return self._shards.join(parts)

    def salvage(self) -> dict[str, Tensor]:
        """Fetch what the survivors of a lost worker hold."""
        parts: dict[int, dict[str, Tensor]] = {}
        for link in self._links:
            state = link.salvage(Get("weights"), State)
            if state is not None:
                parts[link.rank] = unpack_tensors(state.tensors, state.blobs)
        return self._shards.join(parts)

    def first_holders(self) -> Iterator[Link]:
        """Return for each remote stage links to workers that hold all of it together: one, or those of its experts."""
        for stage in range(1, len(self._layout.placement)):
            for rank in self._layout.whole_set(stage, self._links):
                yield self._links[rank]
