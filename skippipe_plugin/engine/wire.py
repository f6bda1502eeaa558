"""How calls and states travel in control messages; both ends import this module and nothing else of each other."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle
import torch
from torch import Tensor

from .call import NO_CACHES, CacheUse, Call, CallSpec
from .channel import Buffer
from .control.values import CallNews, Lacking, TensorEntry
from .errors import SkipPipeError
from .handover import pack_tensors, unpack_tensors
from .optimizer import ParameterKey


class NumberedCall(NamedTuple):
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
) -> tuple[CallNews, list[Buffer]]:
    """Return calls as they travel, and the blobs of the specs and side inputs that their reader lacks."""
    microbatches, numbers, seeds, sides, caches = map(list, zip(*calls, strict=True)) if calls else ([],) * 5
    caching = {}
    if caches.count(NO_CACHES) < len(caches):
        caching = {call.microbatch: call.caches for call in calls if call.caches.keys}
    lacking, blobs = None, list[Buffer]()
    if specs or side_inputs or dropped or dropped_specs or caching:
        entries, tensors = pack_tensors(side_inputs)
        lacking = Lacking([*caching], [*specs], dropped_specs, entries, dropped)
        blobs = [*map(cloudpickle.dumps, (*specs.values(), *caching.values())), *tensors]
    return CallNews(step, microbatches, numbers, seeds, sides, lacking), blobs


class CallDecoder:
    """Turns the calls that one driver sends back into calls; remembers specs and side inputs.

    Args:
        to_device: Brings a tensor to where the blocks compute.
    """

    def __init__(self, to_device: Callable[[Tensor], Tensor]) -> None:
        self._to_device = to_device
        self._specs: dict[int, CallSpec] = {}
        self._side_inputs: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        """The same where the blocks compute, if they are wanted there: copied once for all calls."""

    def decode(self, news: CallNews, blobs: Sequence[Buffer]) -> list[tuple[int, Call]]:
        """Return (microbatch, call) pairs.

        Raises:
            SkipPipeError: They refer to what has not been sent.
        """
        caches = self._learn(news.lacking, blobs) if news.lacking is not None else {}
        try:
            return [
                (microbatch, self._call(self._specs[spec], digests, seed, caches.get(microbatch, NO_CACHES)))
                for microbatch, spec, seed, digests in zip(
                    news.microbatches, news.specs, news.seeds, news.digests, strict=True
                )
            ]
        except KeyError as error:
            raise SkipPipeError(f"a call of step {news.step} names {error}, which was never sent") from None

    def _learn(self, lacking: Lacking, blobs: Sequence[Buffer]) -> dict[int, CacheUse]:
        """Take in what comes with calls, forget what is not needed any more; return what uses caches."""
        for digest in lacking.dropped:
            self._side_inputs.pop(digest, None)
            self._copies.pop(digest, None)
        for number in lacking.dropped_specs:
            self._specs.pop(number, None)
        rest = iter(blobs)
        for number in lacking.specs:
            self._specs[number] = pickle.loads(next(rest))
        caches = {microbatch: pickle.loads(next(rest)) for microbatch in lacking.caching}
        self._side_inputs.update(unpack_tensors(lacking.side_inputs, list(rest)))
        return caches

    def _call(self, spec: CallSpec, digests: Sequence[str], seed: int, caches: CacheUse) -> Call:
        stay = spec.on_host
        slots = enumerate(digests)
        inputs = [self._side_inputs[each] if slot in stay else self._copy(each) for slot, each in slots]
        return Call(spec, tuple(inputs), seed, caches)

    def _copy(self, digest: str) -> Tensor:
        if digest not in self._copies:
            self._copies[digest] = self._to_device(self._side_inputs[digest])
        return self._copies[digest]


def encode_optimizer_state(
    state: Mapping[ParameterKey, Mapping[str, Any]],
) -> tuple[list[TensorEntry], list[Buffer]]:
    """Return the entries and blobs of an optimizer state: tensors raw, the rest pickled in the first blob."""
    tensors: dict[str, Tensor] = {}
    rest: dict[ParameterKey, dict[str, Any]] = {}
    for key, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{key[0]}\t{key[1]}\t{name}"] = value
            else:
                rest.setdefault(key, {})[name] = value
    entries, blobs = pack_tensors(tensors)
    return entries, [cloudpickle.dumps((list(state), rest)), *blobs]


def decode_optimizer_state(
    entries: Sequence[TensorEntry], blobs: Sequence[Buffer]
) -> dict[ParameterKey, dict[str, Any]]:
    """Invert :func:`encode_optimizer_state`."""
    keys, rest = pickle.loads(blobs[0])
    state: dict[ParameterKey, dict[str, Any]] = {key: dict(rest.get(key, {})) for key in keys}
    for name, tensor in unpack_tensors(entries, blobs[1:]).items():
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
