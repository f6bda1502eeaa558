"""Several packed things in one message: each with its own JSON fields and its share of the blobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .channel import Buffer, ChannelError
from .control.values import PartEntry

Part = tuple[Any, Sequence[Buffer]]  # Any: JSON
"""Fields and blobs, as ``pack_tensors``, ``pack_blocks`` and ``encode_optimizer_state`` return them."""


def pack_parts(parts: Mapping[str, Part]) -> tuple[list[PartEntry], list[Buffer]]:
    """Return the entries (name, fields, number of blobs) and all blobs.

    >>> entries, blobs = pack_parts({"a": ({"x": 1}, [b"1", b"2"]), "b": ([], [b"3"])})
    >>> unpack_parts(entries, blobs)
    {'a': ({'x': 1}, [b'1', b'2']), 'b': ([], [b'3'])}
    """
    entries = [(name, fields, len(blobs)) for name, (fields, blobs) in parts.items()]
    return entries, [blob for _, blobs in parts.values() for blob in blobs]


def unpack_parts(entries: Iterable[PartEntry], blobs: Sequence[Buffer]) -> dict[str, Part]:
    """Invert :func:`pack_parts`.

    Raises:
        ChannelError: There are other blobs than the entries say.
    """
    parts, first = {}, 0
    for name, fields, count in entries:
        parts[name] = fields, blobs[first : first + max(0, count)]
        first += max(0, count)
    if first != len(blobs):
        raise ChannelError(f"packed parts should have {first} blobs, and have {len(blobs)}")
    return parts
