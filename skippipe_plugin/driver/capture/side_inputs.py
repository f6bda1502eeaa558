"""What the driver sends beside the hidden states: each distinct spec and side input once per worker."""

from __future__ import annotations

import hashlib
import itertools
import pickle
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Final

import cloudpickle
import torch
from torch import Tensor

from ...engine.call import Call, CallSpec
from ...engine.channel import Buffer
from ...engine.control.values import CallNews
from ...engine.device import HOST
from ...engine.errors import SkipPipeError
from ...engine.memory_order import order_of
from ...engine.transport import as_bytes
from ...engine.wire import NumberedCall, encode_calls
from .fingerprint import Fingerprints

_HASHED_BYTES: Final = 8 << 20
"""Larger side inputs on the host are taken to be new each time: hashing would cost more than it saves."""
_KEPT_BYTES: Final = 64 << 20
"""How much of side inputs each worker keeps for later microbatches and steps."""
_KEPT_SPECS: Final = 256
"""How many distinct specs are remembered: where a value in them changes with every step there is no end of them."""


class SpecNumbers:
    """Numbers distinct call specs."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._unique = itertools.count()
        self._last: tuple[CallSpec, int] | None = None

    def known(self, spec: CallSpec) -> tuple[CallSpec, int]:
        """Return ``spec``, or the equal one that came just before it, and its number, which equal ones share."""
        if self._last is None or self._last[0] != spec:
            try:
                key = cloudpickle.dumps(spec)
            except Exception as error:
                raise SkipPipeError(
                    f"an argument of the blocks cannot be sent to the workers: {error}; pass tensors, numbers, "
                    "strings or containers of them"
                ) from error
            if key not in self._numbers:
                self._numbers[key] = next(self._unique)
            self._numbers.move_to_end(key)
            self._last = (spec, self._numbers[key])
            if len(self._numbers) > _KEPT_SPECS:
                self._numbers.popitem(last=False)
        return self._last


class Digests:
    """Names side inputs by content, so that equal ones are sent once."""

    def __init__(self) -> None:
        self._unique = itertools.count()
        self._fingerprints = Fingerprints()

    def digests(self, tensors: Sequence[Tensor]) -> tuple[str, ...]:
        """Return names that equal tensors share; large ones on the host get a name of their own.

        Those of a device stay there, and are waited for together.
        """
        by_device: dict[torch.device, list[int]] = {}
        for slot, tensor in enumerate(tensors):
            by_device.setdefault(tensor.device, []).append(slot)
        names: dict[int, str] = {}
        for device, slots in by_device.items():
            own = [tensors[slot] for slot in slots]
            found = map(self._on_host, own) if device.type == "cpu" else self._fingerprints.of(own)
            names.update(zip(slots, found, strict=True))
        return tuple(names[slot] for slot in range(len(tensors)))

    def _on_host(self, tensor: Tensor) -> str:
        data = as_bytes(tensor)
        if data.numel() > _HASHED_BYTES:
            return f"#{next(self._unique)}"
        form = f"{tensor.dtype}{list(tensor.shape)}{order_of(tensor)}"
        digest = hashlib.blake2b(form.encode(), digest_size=16)
        digest.update(data.numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A call with everything numbered, ready to be sent to any worker."""

    microbatch: int
    call: Call
    number: int
    digests: tuple[str, ...]


def numbered(calls: Sequence[PreparedCall]) -> list[NumberedCall]:
    """Return calls as they travel."""
    return [NumberedCall(p.microbatch, p.number, p.call.seed, p.digests, p.call.caches) for p in calls]


class Outbox:
    """What one worker has been told, so that it is told nothing twice."""

    def __init__(self) -> None:
        self._specs: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[str, int] = OrderedDict()

    def has_all(self, calls: Sequence[PreparedCall]) -> bool:
        """Whether the worker lacks nothing of calls, which it then needs again; as nearly always."""
        numbers = {call.number for call in calls}  # mostly one
        digests = dict.fromkeys(itertools.chain.from_iterable([call.digests for call in calls]))
        if not (numbers <= self._specs.keys() and digests.keys() <= self._kept.keys()):
            return False
        for number in numbers:
            self._specs.move_to_end(number)
        for digest in digests:
            self._kept.move_to_end(digest)
        return True

    def encode(
        self, step: int, calls: Sequence[PreparedCall], copies: MutableMapping[str, Tensor]
    ) -> tuple[CallNews, list[Buffer]]:
        """Return calls as they travel to this worker; ``copies`` has side inputs on the host, for all workers."""
        specs = {call.number: call.call.spec for call in calls if call.number not in self._specs}
        for number in {call.number for call in calls}:
            self._specs[number] = None
            self._specs.move_to_end(number)
        fresh: dict[str, Tensor] = {}
        used: set[str] = set()
        for prepared in calls:
            for digest, tensor in zip(prepared.digests, prepared.call.side_inputs, strict=True):
                used.add(digest)
                if digest in self._kept:
                    self._kept.move_to_end(digest)
                else:
                    fresh[digest] = copies[digest] = copies[digest] if digest in copies else tensor.to(HOST)
                    self._kept[digest] = tensor.numel() * tensor.element_size()
        return encode_calls(step, numbered(calls), specs, fresh, self._evict(used), self._forget_specs(len(calls)))

    def _forget_specs(self, in_use: int) -> list[int]:
        """Forget the specs that were not needed for longest, but none of this message."""
        forgotten = []
        while len(self._specs) > max(_KEPT_SPECS, in_use):
            forgotten.append(self._specs.popitem(last=False)[0])
        return forgotten

    def _evict(self, used: set[str]) -> list[str]:
        """Forget the side inputs that were not needed for longest until the rest fits."""
        dropped = []
        total = sum(self._kept.values())
        for digest in list(self._kept):
            if total <= _KEPT_BYTES:
                break
            if digest not in used:
                total -= self._kept.pop(digest)
                dropped.append(digest)
        return dropped


def dump_probe(block: int, call: Call, *rest: object) -> bytes:
    """Pickle a question about one block; it is asked once per kind of block. Its tensors travel in host memory."""
    try:
        return cloudpickle.dumps((block, call.at(HOST), *rest))  # type: ignore[no-any-return, unused-ignore]
    except (pickle.PicklingError, TypeError) as error:
        raise SkipPipeError(f"the arguments of block {block} cannot be sent to a worker: {error}") from error
