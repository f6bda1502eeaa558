"""Key-value caches in generation: each stage keeps the part of its own blocks.

In training a cache is neither sent nor kept. In evaluation the driver's cache object stays on the driver, where it
only counts tokens; every stage holds a cache of the same kind under the same key until the driver lets its object go.

A call that was given up, because a connection broke, is run once more. Some stages have added its tokens already, and
some have not: calls have numbers, by which each stage knows, and goes back to what it had before.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .call import NO_CACHES, CacheOp, CacheUse
from .errors import SkipPipeError

CREATE = "create"
"""The CacheOp that founds a cache; its argument is an empty one of the driver's kind."""
COPY = "copy"
"""The CacheOp that makes another cache of one as it is; its argument is the new one's key."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A call that has begun here, or was to."""

    turn: int
    lengths: tuple[int | None, ...]
    """By layer: how many tokens the cache had then; None where it cannot go back to them."""


class CacheShelf:
    """The caches of one stage, by the driver's key."""

    def __init__(self) -> None:
        self._caches: dict[int, Any] = {}  # Any: transformers' Cache, which need not be installed
        self._begun: dict[int, _Begun] = {}

    @classmethod
    def of(cls, use: CacheUse) -> CacheShelf:
        """Return one with the caches that ``use`` founds."""
        shelf = cls()
        shelf.begin(use)
        return shelf

    def begin(self, use: CacheUse) -> None:
        """Have the caches of a call as the driver's code has its own, whether the call runs for the first time or not.

        Raises:
            SkipPipeError: It has run here, and a cache cannot give back what came with it.
        """
        if use is NO_CACHES:
            return
        turns = dict(zip(use.keys, use.turns, strict=True))
        again = [key for key, turn in turns.items() if key in self._begun and self._begun[key].turn == turn]
        for key in again:
            self._go_back(key, [op for op in use.ops if op.key == key])
        if not again:
            self._apply(use.ops)
        for key, turn in turns.items():
            if key in self._caches:
                self._begun[key] = _Begun(turn, tuple(map(_length, _layers(self._caches[key]))))

    def _go_back(self, key: int, ops: list[CacheOp]) -> None:
        if any(op.method == CREATE for op in ops):
            self._apply(ops)
            return
        lengths = self._begun[key].lengths
        for index, layer in enumerate(_layers(self._caches[key])):
            before, now = lengths[index] if index < len(lengths) else 0, _length(layer)
            if before is None or now is None:
                raise SkipPipeError(
                    "a connection broke, so a call of the blocks runs once more, and its key-value cache cannot go "
                    f"back to what it was before ({type(layer).__name__} forgets that): begin the generation anew"
                )
            if now > before:
                layer.crop(before - now)

    def cache(self, key: int) -> Any:
        """Return the stage's cache for ``key``."""
        if key not in self._caches:
            raise SkipPipeError(
                "a key-value cache was filled by a call that went to another replica of this stage, or to workers that "
                "are gone: begin the generation anew in the step that goes on with it, or use replicas=1"
            )
        return self._caches[key]

    def _apply(self, ops: Iterable[CacheOp]) -> None:
        """Repeat what the driver's code did to its cache, such as reordering it for a beam search."""
        for op in ops:
            if op.method == CREATE:
                self._caches[op.key] = copy.deepcopy(op.args[0])
            elif op.key in self._caches and op.method == COPY:
                self._caches[op.args[0]] = copy.deepcopy(self._caches[op.key])
            elif op.key in self._caches:
                getattr(self._caches[op.key], op.method)(*op.args)

    def drop(self, keys: Iterable[int]) -> None:
        """Free caches."""
        for key in keys:
            self._caches.pop(key, None)
            self._begun.pop(key, None)


def _layers(cache: Any) -> Iterator[Any]:
    """Yield the layers of a cache of transformers; that of an encoder-decoder is two."""
    both = isinstance(cache, sys.modules["transformers.cache_utils"].EncoderDecoderCache)
    for part in (cache.self_attention_cache, cache.cross_attention_cache) if both else (cache,):
        yield from part.layers


def _length(layer: Any) -> int | None:
    """Return how many tokens a layer has, if it can give back those that are added to it."""
    if type(layer) is not sys.modules["transformers.cache_utils"].DynamicLayer:
        return None
    return int(layer.get_seq_length())
