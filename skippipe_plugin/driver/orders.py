"""Orders: what a worker holds from now on, with everything that it lacks for that.

Blocks come to a worker in the middle of a run in this way only, whether it replaces another one or the number of stages
has changed. An order is one message, so a worker has carried it out or has not. Until all have carried theirs out each
also retains what it held before: a driver that dies on the way leaves every block somewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..engine import phases
from ..engine.control.answers import Ready, State
from ..engine.control.commands import Arrange, Get
from ..engine.control.keeping import AskRecords, LetGo, Records
from ..engine.control.values import What
from ..engine.handover import pack_tensors, unpack_tensors
from ..engine.optimizer import ParameterKey
from ..engine.parcel import KeptRecord, Parcel, unpack_records
from ..engine.wire import decode_optimizer_state, encode_optimizer_state, tensor_key
from .links import Link
from .pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Cargo:
    """What travels, of all blocks together."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers, by ``"<block>\\t<name>"``."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """What is accumulated."""
    optimizer: dict[ParameterKey, dict[str, Any]] = field(default_factory=dict)  # Any: the optimizer class defines it
    attributes: dict[str, Tensor] = field(default_factory=dict)
    """What forwards have written into the blocks' attributes, packed."""
    norms: dict[int, float] = field(default_factory=dict)
    """By stage of the layout that it was fetched in: the norm of its last gradient."""
    estimates: set[int] = field(default_factory=set)
    """The blocks that were rebuilt from others, and have not taken an optimizer step since."""

    def share(self, blocks: Collection[int]) -> Cargo:
        """Return what is of some blocks, but no norms: those are of stages."""
        return Cargo(
            {name: tensor for name, tensor in self.weights.items() if tensor_key(name)[0] in blocks},
            {name: tensor for name, tensor in self.gradients.items() if tensor_key(name)[0] in blocks},
            {key: state for key, state in self.optimizer.items() if key[0] in blocks},
            {name: tensor for name, tensor in self.attributes.items() if tensor_key(name)[0] in blocks},
            estimates=self.estimates.intersection(blocks),
        )


def num_bytes(order: Arrange) -> int:
    """Return how much travels with an order."""
    return sum(memoryview(blob).nbytes for blob in order.blobs)


def fetch(sources: Mapping[Link, Collection[int]]) -> Cargo:
    """Ask each worker for everything that belongs to some of its blocks."""
    cargo = Cargo()
    parts = {"weights": cargo.weights, "gradients": cargo.gradients, "attributes": cargo.attributes}
    kinds: tuple[What, ...] = ("weights", "gradients", "attributes", "optimizer")
    asked = {(link, what): link.send(Get(what, sorted(blocks))) for link, blocks in sources.items() for what in kinds}
    for link, blocks in sources.items():
        for what in kinds:
            state = link.expect(State, asked[link, what])
            if what == "optimizer":
                cargo.optimizer.update(decode_optimizer_state(state.tensors, state.blobs))
            else:
                tensors = unpack_tensors(state.tensors, state.blobs)
                cargo.norms.update(state.norms)
                cargo.estimates.update(set(state.estimates) & set(blocks))
                parts[what].update(tensors)
    return cargo


def fetch_records(link: Link) -> dict[str, KeptRecord]:
    """Return what a worker keeps of the driver's own state, by name; nothing without a supervisor."""
    kept = link.ask(AskRecords(), Records)
    return unpack_records(kept.records, kept.blobs)


def order(
    pipeline: Pipeline,
    rank: int,
    cargo: Cargo,
    *,
    held: Collection[int] = (),
    records: Mapping[str, KeptRecord] | None = None,
    moves: bool = False,
) -> Arrange:
    """Say what the worker at ``rank`` holds, and give it what it lacks.

    Args:
        pipeline: Whose layout counts; it knows the structures of the blocks and the optimizer.
        rank: The worker's.
        cargo: What was fetched, of these blocks at least.
        held: The blocks that the worker has.
        records: What it keeps of the driver's own state from now on.
        moves: Whether it was fetched in another layout, whose stages were others.
    """
    layout = pipeline.layout
    wanted = layout.hosted(rank)
    lacking = [block for block in wanted if block not in held]
    share = cargo.share(lacking)
    parcel = Parcel(
        structure=pipeline.sender.structure(lacking),
        weights=pack_tensors(share.weights),
        gradients=pack_tensors(share.gradients),
        optimizer=encode_optimizer_state(share.optimizer),
        attributes=pack_tensors(share.attributes),
        plan=pipeline.optimizer_plan,
        records=records or {},
    )
    parts, blobs = parcel.pack()
    stages = layout.stages_of(rank)
    return Arrange(
        stages=[(stage, list(layout.blocks(stage)), pipeline.shards.described(stage, rank)) for stage in stages],
        keep=[block for block in wanted if block in held],
        classes=pipeline.sender.classes(lacking),
        overlap=pipeline.shards.overlap,
        norms=[] if moves else [(stage, cargo.norms[stage]) for stage in stages if stage in cargo.norms],
        estimates=sorted(share.estimates),
        parts=parts,
        compile=pipeline.sender.compilation,
        blobs=blobs,
        stand=pipeline.gradients.stand(),
    )


def carry_out(pipeline: Pipeline, orders: Mapping[int, Arrange]) -> None:
    """Let workers carry their orders out, by rank, in the generation that has been formed."""
    phases.reach(phases.Phase.TAKING_OVER)
    links = [pipeline.links[rank] for rank in orders]
    sent = [link.send(each) for link, each in zip(links, orders.values(), strict=True)]
    for link, number in zip(links, sent, strict=True):
        link.expect(Ready, number)
    for link in links:
        link.tell(LetGo())
    pipeline.routers.resend()
