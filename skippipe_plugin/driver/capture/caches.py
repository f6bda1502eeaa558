"""The driver's side of key-value caches: its cache object counts tokens, the keys and values stay on the workers."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import weakref
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import torch

from ...engine.call import CacheOp, CacheUse
from ...engine.errors import SkipPipeError
from ...engine.kvcache import COPY, CREATE

_REPEATED_METHODS: Final = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
WITH_GRADIENTS: Final = (
    "this key-value cache was handed to the blocks of a pipeline while gradients were on, where the workers keep "
    "no keys and values. To go on from it, call the model under torch.no_grad() from the first call on"
)
OF_MICROBATCHES: Final = (
    "this key-value cache was returned by a call of the model that was cut into microbatches, of which none has the "
    "keys and values of all samples. To go on from it, call the model with use_cache=True, or with an empty cache from "
    "the first call on (transformers.DynamicCache(config=model.config)), under torch.no_grad(): such a call is not cut"
)


def is_cache(value: object) -> bool:
    """Whether ``value`` is a key-value cache of transformers (which need not be installed)."""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _num_tokens(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except ValueError as error:
        raise SkipPipeError(
            f"a cache without attention layers ({error}) cannot be kept on the workers; generate with use_cache=False"
        ) from error


def close(cache: Any, why: str) -> Any:
    """Return ``cache``, which holds nothing of what it should: whoever asks it for anything is told ``why``."""
    if not isinstance(cache, _Closed):
        cls: type = type(cache)
        cache.__class__ = _closed_class(cls)
        cache.__dict__["_skippipe_why"] = why
    return cache


class _Closed:
    """Makes a cache answer nothing, but be one still."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            value = object.__getattribute__(self, name)  # what a cache does not have is missing here, too
            if callable(value) or name == "layers":
                raise SkipPipeError(vars(self)["_skippipe_why"])
            return value
        return object.__getattribute__(self, name)

    def __deepcopy__(self, _: Any) -> Any:
        return self

    def __reduce_ex__(self, _: Any) -> Any:
        raise SkipPipeError(vars(self)["_skippipe_why"])


@functools.cache
def _closed_class(cls: type) -> type:
    def refuse(self: Any, *_: Any) -> NoReturn:
        raise SkipPipeError(vars(self)["_skippipe_why"])

    asked = dict.fromkeys(("__len__", "__iter__", "__getitem__"), refuse)
    return type(cls.__name__, (_Closed, cls), {"__repr__": object.__repr__, "__bool__": lambda _: True, **asked})


class CacheLedger:
    """Numbers the caches of the driver and notes what its code does to them between calls."""

    def __init__(self) -> None:
        self._keys: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # Any: transformers' Cache
        self._next = itertools.count()
        self._ops: dict[int, list[CacheOp]] = {}
        self._empty: dict[int, Any] = {}
        """What each was before it held anything."""
        self._turns: dict[int, int] = {}
        """How many calls have had each."""
        self._original: dict[int, int] = {}
        """Of which cache one is a copy that no worker has made yet."""
        self._freed: list[int] = []

    @staticmethod
    def is_filled(cache: Any) -> bool:
        """Whether ``cache`` holds keys and values."""
        return _num_tokens(cache) > 0

    def key(self, cache: Any) -> int:
        """Return the number of ``cache``, watching it from now on."""
        if cache not in self._keys:
            if _num_tokens(cache) > 0:
                raise SkipPipeError(
                    "a key-value cache that was filled outside of the pipeline cannot be used in it; "
                    "start the generation with an empty one"
                )
            empty = copy.deepcopy(cache)
            key = self._enter(cache, empty)
            self._ops[key].append(CacheOp(key, CREATE, (empty,)))
        return self._keys[cache]

    def emptied(self, keys: Sequence[int]) -> CacheUse:
        """Return how to found caches like ``keys`` with nothing in them, to ask what blocks do with one."""
        return CacheUse(
            tuple(keys), tuple(CacheOp(key, CREATE, (self._empty[key],)) for key in keys), turns=(0,) * len(keys)
        )

    def use(self, keys: Sequence[int]) -> CacheUse:
        """Count a call with the caches ``keys``; return what the workers need to know of it."""
        turns = tuple(self._turns.get(key, 0) for key in keys)
        self._turns.update((key, turn + 1) for key, turn in zip(keys, turns, strict=True))
        return CacheUse(tuple(keys), self.take_ops(keys), turns)

    def take_ops(self, keys: Sequence[int]) -> tuple[CacheOp, ...]:
        """Return what happened to the caches ``keys`` since the last call, and to those that they are copies of."""
        ops: list[CacheOp] = []
        for key in keys:
            if key in self._original:
                ops += self.take_ops([self._original[key]])
            ops += self._ops.get(key, ())
            self._ops[key] = []
        for op in ops:
            if op.method == COPY:
                self._original.pop(op.args[0], None)
        return tuple(ops)

    def take_freed(self) -> list[int]:
        """Return the numbers of the caches that are gone, and of which no copy is still to be made."""
        needed = set(self._original.values())
        freed = [key for key in self._freed if key not in needed]
        self._freed[:] = [key for key in self._freed if key in needed]
        for key in freed:
            if key in self._original:
                pending = self._ops[self._original[key]]
                pending[:] = [op for op in pending if op.method != COPY or op.args[0] != key]
            for known in (self._ops, self._empty, self._turns, self._original):
                known.pop(key, None)
        return freed

    def count(self, cache: Any, shape: Sequence[int], device: torch.device, num_blocks: int) -> None:
        """Let the driver's cache know how many tokens passed, with keys and values of one byte per token.

        Without any, a cache would take itself to be empty, and the masks of padded prompts would be too short.

        Args:
            cache: The driver's.
            shape: Of the hidden states that the blocks made: samples, tokens, ...
            device: Where those are.
            num_blocks: How many blocks have a part in it.
        """
        nothing = torch.zeros(shape[0], 1, shape[1], 1, dtype=torch.bool, device=device)
        counting = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder, beside that of its encoder
        for layer in range(num_blocks):
            counting.update(nothing, nothing, layer)

    def _enter(self, cache: Any, empty: Any) -> int:
        key = self._keys[cache] = next(self._next)
        self._ops[key], self._empty[key] = [], empty
        self._watch(cache, key)
        weakref.finalize(cache, self._freed.append, key)
        return key

    def _copied(self, reference: weakref.ref[Any], key: int, memo: dict[int, Any]) -> Any:
        """Copy a cache deeply, as who reuses that of a common prompt does; workers copy theirs when it is next used."""
        cache = reference()
        result = memo[id(cache)] = copy.copy(cache)
        for name in ("__deepcopy__", *_REPEATED_METHODS):
            vars(result).pop(name, None)
        vars(result).update(copy.deepcopy(vars(result), memo))
        other = self._enter(result, self._empty[key])
        self._original[other] = key
        self._ops[key].append(CacheOp(key, COPY, (other,)))
        return result

    def _watch(self, cache: Any, key: int) -> None:
        # The wrappers must not hold the cache: it would then be freed only by the cycle collector.
        reference = weakref.ref(cache)
        cache.__deepcopy__ = functools.partial(self._copied, reference, key)
        for name in _REPEATED_METHODS:
            if hasattr(type(cache), name):
                setattr(cache, name, functools.partial(self._repeat, reference, key, name))

    def _repeat(self, reference: weakref.ref[Any], key: int, name: str, *args: Any) -> Any:
        self._ops[key].append(CacheOp(key, name, args))
        return getattr(type(reference()), name)(reference(), *args)
