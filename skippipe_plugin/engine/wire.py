"""How calls and states look on the control channel; both ends import this module and nothing else of each other.

Kinds from a driver: ``configure load warm arrange schedule ping step calls merge norm optimizer optimizer_step
optimizer_mode get put keep outlive clip pass probe parts abort release exit``. Kinds from a worker: ``hello warmed
ready links done norm1 norm2... state kept probe parts leave error``. Commands come from the first driver; ``step``
(with the first calls in it), ``calls``, ``probe`` and ``parts`` from each; answers go to every driver, so that all
know the same.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import Tensor

from .call import NO_CACHES, CacheUse, Call, CallSpec
from .channel import Buffer, Message
from .handover import pack_tensors, unpack_tensors
from .optimizer import ParameterKey


def norm_answer(number: int) -> str:
    """Name the answer to a numbered request for a gradient norm."""
    return f"norm{number}"


def is_norm_answer(kind: str) -> bool:
    """Whether this is what :func:`norm_answer` returns."""
    return kind.startswith("norm")


@dataclass(frozen=True, slots=True)
class NumberedCall:
    """A call as it travels: its spec by number and its side inputs by digest."""

    microbatch: int
    spec: int
    seed: int
    side_inputs: tuple[str, ...]
    caches: CacheUse = NO_CACHES


def encode_calls(
    step: int,
    calls: Sequence[NumberedCall],
    specs: Mapping[int, CallSpec],
    side_inputs: Mapping[str, Tensor],
    dropped: Sequence[str],
    dropped_specs: Sequence[int] = (),
) -> tuple[dict[str, Any], list[Buffer]]:
    """Return the fields and blobs of a ``calls`` message with the specs and side inputs its reader lacks."""
    entries, blobs = pack_tensors(side_inputs)
    caching = {call.microbatch: call.caches for call in calls if call.caches.keys}
    fields = {
        "step": step,
        "calls": [[call.microbatch, call.spec, call.seed, call.side_inputs] for call in calls],
        "caching": list(caching),
        "specs": list(specs),
        "dropped_specs": list(dropped_specs),
        "side_inputs": entries,
        "dropped": list(dropped),
    }
    return fields, [*map(cloudpickle.dumps, (*specs.values(), *caching.values())), *blobs]


class CallDecoder:
    """Turns the ``calls`` messages of one driver back into calls; remembers specs and side inputs."""

    def __init__(self, to_device: Callable[[Tensor], Tensor]) -> None:
        self._to_device = to_device
        self._specs: dict[int, CallSpec] = {}
        self._side_inputs: dict[str, Tensor] = {}

    def decode(self, message: Message) -> list[tuple[int, Call]]:
        """Return (microbatch, call) pairs."""
        fields, blobs = message.fields, message.blobs
        for digest in fields["dropped"]:
            self._side_inputs.pop(digest, None)
        for number in fields["dropped_specs"]:
            self._specs.pop(number, None)
        rest = iter(blobs)
        for number in fields["specs"]:
            self._specs[number] = pickle.loads(next(rest))
        caches = {microbatch: pickle.loads(next(rest)) for microbatch in fields["caching"]}
        for digest, tensor in unpack_tensors(fields["side_inputs"], list(rest)).items():
            self._side_inputs[digest] = self._to_device(tensor)
        return [
            (microbatch, Call(self._specs[spec], self._inputs(digests), seed, caches.get(microbatch, NO_CACHES)))
            for microbatch, spec, seed, digests in fields["calls"]
        ]

    def _inputs(self, digests: Iterable[str]) -> tuple[Tensor, ...]:
        return tuple(self._side_inputs[digest] for digest in digests)


def encode_optimizer_state(state: Mapping[ParameterKey, Mapping[str, Any]]) -> tuple[dict[str, Any], list[Buffer]]:
    """Return the fields and blobs of an optimizer state: tensors raw, the rest pickled."""
    tensors: dict[str, Tensor] = {}
    rest: dict[ParameterKey, dict[str, Any]] = {}
    for key, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{key[0]}\t{key[1]}\t{name}"] = value
            else:
                rest.setdefault(key, {})[name] = value
    entries, blobs = pack_tensors(tensors)
    return {"tensors": entries}, [cloudpickle.dumps((list(state), rest)), *blobs]


def decode_optimizer_state(fields: Mapping[str, Any], blobs: Sequence[Buffer]) -> dict[ParameterKey, dict[str, Any]]:
    """Invert :func:`encode_optimizer_state`."""
    keys, rest = pickle.loads(blobs[0])
    state: dict[ParameterKey, dict[str, Any]] = {key: dict(rest.get(key, {})) for key in keys}
    for name, tensor in unpack_tensors(fields["tensors"], blobs[1:]).items():
        block, parameter, entry = name.split("\t")
        state[int(block), parameter][entry] = tensor
    return state


def block_tensors(blocks: Mapping[int, torch.nn.Module]) -> dict[str, Tensor]:
    """Return parameters and buffers of blocks under ``"<block>\\t<name>"``, non-persistent buffers too."""
    return {
        tensor_name(index, name): tensor
        for index, block in blocks.items()
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
    }


def tensor_name(block: int, name: str) -> str:
    """Return the name under which a block's parameter or buffer travels, ``"<block>\\t<name>"``."""
    return f"{block}\t{name}"


def tensor_key(name: str) -> ParameterKey:
    """Invert :func:`tensor_name`."""
    block, _, local = name.partition("\t")
    return int(block), local
