"""The driver's side of key-value caches: its cache object counts tokens, the keys and values stay on the workers."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import weakref
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...engine.call import CacheOp
from ...engine.errors import SkipPipeError
from ...engine.kvcache import CREATE

_REPEATED_METHODS: Final = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


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


class CacheLedger:
    """Numbers the caches of the driver and notes what its code does to them between calls."""

    def __init__(self) -> None:
        self._keys: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # Any: transformers' Cache
        self._next = itertools.count()
        self._ops: dict[int, list[CacheOp]] = {}
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
            key = next(self._next)
            self._ops[key] = [CacheOp(key, CREATE, (copy.deepcopy(cache),))]
            self._keys[cache] = key
            self._watch(cache, key)
            weakref.finalize(cache, self._freed.append, key)
        return self._keys[cache]

    def take_ops(self, keys: Sequence[int]) -> tuple[CacheOp, ...]:
        """Return what happened to the caches ``keys`` since the last call."""
        ops = tuple(op for key in keys for op in self._ops.get(key, ()))
        for key in keys:
            self._ops[key] = []
        return ops

    def take_freed(self) -> list[int]:
        """Return the numbers of the caches that are gone."""
        freed, self._freed[:] = list(self._freed), []
        for key in freed:
            self._ops.pop(key, None)
        return freed

    def count(self, cache: Any, hidden: Tensor, num_blocks: int) -> None:
        """Let the driver's cache know how many tokens passed, with keys and values of one byte per token.

        Without any, a cache would take itself to be empty, and the masks of padded prompts would be too short.
        """
        nothing = torch.zeros(hidden.shape[0], 1, hidden.shape[1], 1, dtype=torch.bool, device=hidden.device)
        for layer in range(num_blocks):
            cache.update(nothing, nothing, layer)

    def _watch(self, cache: Any, key: int) -> None:
        # The wrappers must not hold the cache: it would then be freed only by the cycle collector.
        reference = weakref.ref(cache)
        for name in _REPEATED_METHODS:
            if hasattr(type(cache), name):
                setattr(cache, name, functools.partial(self._repeat, reference, key, name))

    def _repeat(self, reference: weakref.ref[Any], key: int, name: str, *args: Any) -> Any:
        self._ops[key].append(CacheOp(key, name, args))
        return getattr(type(reference()), name)(reference(), *args)
