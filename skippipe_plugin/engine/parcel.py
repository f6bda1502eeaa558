"""What comes to a worker with blocks, in one message: each part with its own fields and its share of the blobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .channel import Buffer, ChannelError
from .control.values import PackedBlocks, Parts, Record, RecordEntry, TensorEntry

KeptRecord = tuple[Record, Sequence[Buffer]]
"""A record of the driver's own state, with its blobs."""
PackedTensors = tuple[Sequence[TensorEntry], Sequence[Buffer]]
"""As ``pack_tensors`` returns them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Blocks with all that belongs to them."""

    structure: tuple[PackedBlocks, Sequence[Buffer]]
    """As ``pack_blocks`` returns them."""
    weights: PackedTensors
    gradients: PackedTensors
    optimizer: PackedTensors
    """Its state, as ``encode_optimizer_state`` returns it."""
    attributes: PackedTensors
    """What forwards have written into the blocks' attributes, as ``BlockStates.packed_attributes`` tells of it."""
    plan: Buffer | None
    """What it is built from; None where there is none yet."""
    records: Mapping[str, KeptRecord]
    """What the worker keeps of the driver's own state, by name."""

    def pack(self) -> tuple[Parts, list[Buffer]]:
        """Return the fields, and the blobs of all parts."""
        entries, blobs = pack_records(self.records.values())
        plan = [] if self.plan is None else [self.plan]
        (structure, first), (weights, second), (gradients, third) = self.structure, self.weights, self.gradients
        (optimizer, fourth), (attributes, fifth) = self.optimizer, self.attributes
        fields = Parts(structure, weights, gradients, optimizer, attributes, self.plan is not None, entries)
        return fields, [*first, *second, *third, *fourth, *fifth, *plan, *blobs]

    @classmethod
    def unpack(cls, parts: Parts, blobs: Sequence[Buffer]) -> Parcel:
        """Invert :meth:`pack`.

        Raises:
            ChannelError: There are other blobs than the fields say.
        """
        # The structure and what is no tensor of the optimizer's state are a blob each, before those of the tensors.
        counts = [1 + len(parts.structure[0]), len(parts.weights), len(parts.gradients), 1 + len(parts.optimizer)]
        counts += [len(parts.attributes), int(parts.has_plan)]
        structure, weights, gradients, optimizer, attributes, plan, records = _shares(counts, blobs)
        return cls(
            structure=(parts.structure, structure),
            weights=(parts.weights, weights),
            gradients=(parts.gradients, gradients),
            optimizer=(parts.optimizer, optimizer),
            attributes=(parts.attributes, attributes),
            plan=plan[0] if plan else None,
            records=unpack_records(parts.records, records),
        )


def pack_records(records: Iterable[KeptRecord]) -> tuple[list[RecordEntry], list[Buffer]]:
    """Return the entries of records, and all blobs."""
    kept = list(records)
    return [(record, len(blobs)) for record, blobs in kept], [blob for _, blobs in kept for blob in blobs]


def unpack_records(entries: Sequence[RecordEntry], blobs: Sequence[Buffer]) -> dict[str, KeptRecord]:
    """Invert :func:`pack_records`; the records are by name.

    Raises:
        ChannelError: There are other blobs than the entries say.
    """
    *shares, rest = _shares([count for _, count in entries], blobs)
    if rest:
        raise ChannelError(f"packed records have {len(rest)} blobs too many")
    return {record.name: (record, own) for (record, _), own in zip(entries, shares, strict=True)}


def _shares(counts: Sequence[int], blobs: Sequence[Buffer]) -> list[Sequence[Buffer]]:
    """Return so many blobs each, and last those that are left.

    >>> _shares([1, 2], [b"1", b"2", b"3", b"4"])
    [[b'1'], [b'2', b'3'], [b'4']]

    Raises:
        ChannelError: There are not so many.
    """
    if min(counts, default=0) < 0 or sum(counts) > len(blobs):
        raise ChannelError(f"what is packed should have {[*counts]} blobs, and has {len(blobs)}")
    shares, first = list[Sequence[Buffer]](), 0
    for count in counts:
        shares.append(blobs[first : first + count])
        first += count
    return [*shares, blobs[first:]]
