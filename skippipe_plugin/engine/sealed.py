"""Messages as bytes that are proved piece by piece, under a key of one direction of a connection.

A message is a head of a fixed size, then the sizes of its blobs, its text, its blobs: the body. A proof (an HMAC-SHA256
over the message's number and everything in it so far) follows the head, each 256 KiB of the body, and its end. So no
length is believed, and no memory taken, before the head that names it is proved; and what keeps a connection alive are
proved pieces: bytes that trickle in without proof are no sign of life.
"""

from __future__ import annotations

import contextlib
import hmac
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .handshake import MAGIC, PROTOCOL_VERSION, ChannelError

try:  # what hmac.new wraps: a wrapper's methods are calls of Python's
    import _hashlib
except ImportError:  # a Python without OpenSSL
    _hashlib = None  # type: ignore[assignment]

Buffer = bytes | bytearray | memoryview | mmap.mmap

PIECE_BYTES: Final = 256 << 10
"""After how much of a body a proof stands: a slow link moves that in less time than a heartbeat waits."""
PROOF_BYTES: Final = 16
MAX_TEXT_BYTES: Final = 64 << 20
MAX_BLOBS: Final = 1 << 20
MAX_BLOB_BYTES: Final = 1 << 40
_MAPPED_BYTES: Final = 128 << 10
"""From where on blobs have pages of their own."""

_HEAD = struct.Struct("!4sHIIQ")  # magic, version, number of blobs, bytes of text, bytes of all blobs
_SIZE = struct.Struct("!Q")
_NUMBER = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class Body:
    """What a message holds."""

    text: bytearray
    blobs: Sequence[Buffer]


class _Proofs:
    """The proofs of one direction, message by message."""

    def __init__(self, key: bytes) -> None:
        new: Callable[..., Any] = hmac.new if _hashlib is None else _hashlib.hmac_new
        self._start: hmac.HMAC = new(key, digestmod="sha256")
        self.count = 0
        """How many messages there were."""

    def next(self, head: Buffer) -> hmac.HMAC:
        """Begin with the next message."""
        proof = self._start.copy()
        proof.update(_NUMBER.pack(self.count))
        proof.update(head)
        self.count += 1
        return proof


class Sealer:
    """Makes the bytes of the messages that go out.

    Args:
        key: Of this direction of the connection.
    """

    def __init__(self, key: bytes) -> None:
        self._proofs = _Proofs(key)

    @property
    def count(self) -> int:
        """How many messages there were."""
        return self._proofs.count

    def seal(self, text: bytes, blobs: Sequence[memoryview] = ()) -> Iterator[list[Buffer]]:
        """Yield the buffers of the next message, those of a piece at a time; all are to be sent, in this order."""
        head = _HEAD.pack(MAGIC, PROTOCOL_VERSION, len(blobs), len(text), sum(blob.nbytes for blob in blobs))
        proof, left = self._proofs.next(head), PIECE_BYTES
        if not blobs and len(text) <= PIECE_BYTES:  # nearly all
            first = _of(proof)
            proof.update(text)
            yield [head, first, text, _of(proof)]
            return
        piece: list[Buffer] = [head, _of(proof)]
        for part in (memoryview(b"".join([*(_SIZE.pack(blob.nbytes) for blob in blobs), text])), *blobs):
            rest = part
            while rest:
                taken, rest = rest[:left], rest[left:]
                proof.update(taken)
                piece.append(taken)
                left -= taken.nbytes
                if not left:
                    yield [*piece, _of(proof)]
                    piece, left = [], PIECE_BYTES
        if piece:
            yield [*piece, _of(proof)]


class Opener:
    """Takes the bytes of the messages that come in.

    Args:
        key: Of this direction of the connection.
        fill: Fills a buffer from the connection.
        on_proof: Called when a piece is proved.
    """

    def __init__(self, key: bytes, fill: Callable[[memoryview], None], on_proof: Callable[[], None]) -> None:
        self._proofs = _Proofs(key)
        self._fill = fill
        self._on_proof = on_proof

    @property
    def count(self) -> int:
        """How many messages have come."""
        return self._proofs.count

    def open(self) -> Body:
        """Wait for the next message.

        Raises:
            ChannelError: What came was altered on its way, is over the limits, or there is no memory for it.
        """
        start = self._read(_HEAD.size + PROOF_BYTES)
        head = start[: _HEAD.size]
        proof = self._proofs.next(head)
        self._compare(start[_HEAD.size :], proof)
        magic, version, num_blobs, text_bytes, blob_bytes = _HEAD.unpack(head)
        if magic != MAGIC or version != PROTOCOL_VERSION:
            raise ChannelError(f"what came is no control message of protocol {PROTOCOL_VERSION}")
        if text_bytes > MAX_TEXT_BYTES or num_blobs > MAX_BLOBS or blob_bytes > MAX_BLOB_BYTES:
            raise ChannelError(f"a control message of {text_bytes} + {blob_bytes} bytes is over the limit")
        if not num_blobs and 0 < text_bytes <= PIECE_BYTES:  # nearly all: one call of the system
            text = self._read(text_bytes + PROOF_BYTES)
            last = text[text_bytes:]
            del text[text_bytes:]
            proof.update(text)
            self._compare(last, proof)
            return Body(text, ())
        first = bytearray(_SIZE.size * num_blobs + text_bytes)
        left = self._take(proof, first, PIECE_BYTES)
        sizes = [size for (size,) in _SIZE.iter_unpack(memoryview(first)[: _SIZE.size * num_blobs])]
        if sum(sizes) != blob_bytes:  # as proved: no more memory than that is taken for sizes that may not be
            raise ChannelError("the blobs of a control message do not add up to its head")
        blobs = []
        for size in sizes:
            blobs.append(_memory(size))
            left = self._take(proof, blobs[-1], left)
        if left < PIECE_BYTES:
            self._check(proof)
        del first[: _SIZE.size * num_blobs]
        return Body(first, blobs)

    def _take(self, proof: hmac.HMAC, data: bytearray | mmap.mmap, left: int) -> int:
        """Fill ``data`` from a body of whose present piece ``left`` bytes are to come; return how many are then."""
        rest = memoryview(data)
        while rest:
            taken, rest = rest[:left], rest[left:]
            self._fill(taken)
            proof.update(taken)
            left -= taken.nbytes
            if not left:
                self._check(proof)
                left = PIECE_BYTES
        return left

    def _check(self, proof: hmac.HMAC) -> None:
        self._compare(self._read(PROOF_BYTES), proof)

    def _compare(self, came: bytearray, proof: hmac.HMAC) -> None:
        if not hmac.compare_digest(came, _of(proof)):
            raise ChannelError("a control message was altered on its way, or does not come from the other end")
        self._on_proof()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        self._fill(memoryview(data))
        return data


def _of(proof: hmac.HMAC) -> bytes:
    return proof.digest()[:PROOF_BYTES]


def _memory(size: int) -> bytearray | mmap.mmap:
    """Return memory that the host has again as soon as nobody uses it, if it is much.

    The C library keeps some of what a thread had for that thread, and messages come in threads of their own.
    """
    if size >= _MAPPED_BYTES and hasattr(mmap, "MAP_PRIVATE"):
        with contextlib.suppress(OSError):  # there is a limit to their number, too
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        return bytearray(size)
    except MemoryError as error:
        raise ChannelError(f"there is no memory for a control message of {size} bytes") from error
