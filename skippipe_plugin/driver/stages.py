"""Sends stages to the workers that are to hold them, and knows their structures afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..engine import phases
from ..engine.channel import Buffer
from ..engine.classes import Prints, fingerprints
from ..engine.control.commands import Load
from ..engine.control.values import PackedBlocks
from ..engine.device import HOST
from ..engine.handover import pack_blocks, unpack_blocks
from .capture.twins import apart
from .formation import HasLayout
from .layout import Layout
from .links import Link, Links
from .shards import ExpertShards

Packed = tuple[PackedBlocks, list[Buffer]]
"""Packed blocks: entries and blobs."""


class StageSender:
    """Hands the blocks of a model over to its workers.

    Args:
        formed: Knows which blocks make which stage, and which ranks hold it.
        blocks: The block stack, with its weights until :meth:`send_all` has been called.
        compilation: How the blocks are compiled, packed.
        seed: For blocks that were built on the meta device.
        keep_structures: Whether workers may take stages over later; then the structures are kept.
        shards: Which worker holds which experts.
        device: This driver's.
    """

    def __init__(
        self,
        formed: HasLayout,
        blocks: Sequence[nn.Module],
        compilation: bytes,
        seed: int,
        *,
        keep_structures: bool,
        shards: ExpertShards,
        device: torch.device = HOST,
    ) -> None:
        self._device = device
        self._formed = formed
        self.compilation = compilation
        self._blocks = blocks
        self._seed = seed
        self._structures: dict[tuple[int, ...], Packed] = {}
        """By the blocks of the first layout's stages."""
        self._classes: dict[tuple[int, ...], Prints] = {}
        """The same: what their classes were when they were sent."""
        self._keep = keep_structures
        self._shards = shards

    @property
    def _layout(self) -> Layout:
        return self._formed.layout

    def send_all(self, links: Links) -> None:
        """Send every stage to the workers that hold it."""
        for stage, ranks in enumerate(self._layout.placement):
            remote = [rank for rank in ranks if rank in links]
            if not stage or not remote:
                continue
            blocks = apart({block: self._blocks[block] for block in self._layout.blocks(stage)})
            if self._keep:
                self._structures[tuple(blocks)] = pack_blocks(blocks, values=False)
                self._classes[tuple(blocks)] = fingerprints(blocks.values())
            packed: dict[int, Packed] = {}
            for rank in remote:
                position = self._layout.position(rank)
                if position not in packed:
                    packed = {position: pack_blocks(blocks, instead=self._shards.cut(blocks, rank))}
                self._send(links[rank], stage, packed[position])

    def structure(self, blocks: Iterable[int]) -> Packed:
        """Return some blocks together, without values."""
        wanted = tuple(blocks)
        if wanted in self._structures:
            return self._structures[wanted]
        known = [packed for stage, packed in self._structures.items() if not set(stage).isdisjoint(wanted)]
        found: dict[int, nn.Module] = {}
        for packed in known:
            found |= unpack_blocks(*packed, device=self._device, by_own_classes=True)
        return pack_blocks({index: found[index] for index in wanted})

    def classes(self, blocks: Iterable[int]) -> Prints:
        """Return what a worker that takes some blocks over compares with its own classes."""
        wanted, found = set(blocks), Prints()
        for stage, prints in self._classes.items():
            if not wanted.isdisjoint(stage):
                for owner, entries in prints.items():
                    found.setdefault(owner, {}).update(entries)
        return found

    def sample(self) -> Packed:
        """Return the structure of some stage, for who wants to import its classes in advance."""
        return next(iter(self._structures.values()))

    def _send(self, link: Link, stage: int, packed: Packed) -> None:
        phases.reach(phases.Phase.HANDING_OVER)
        entries, blobs = packed
        load = Load(
            stage=stage,
            seed=self._seed + stage,
            first=stage == link.stages[0],
            last=stage == link.stages[-1],
            overlap=self._shards.overlap,
            blocks=entries,
            classes=fingerprints(self._blocks[block] for block in self._layout.blocks(stage)),
            experts=self._shards.described(stage, link.rank),
            compile=self.compilation,
            blobs=blobs,
        )
        link.send(load)
