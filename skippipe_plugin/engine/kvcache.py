"""Key-value caches in generation: each stage keeps the part of its own blocks.

In training a cache is neither sent nor kept. In evaluation the driver's cache object stays on the driver, where it
only counts tokens; every stage holds a cache of the same kind under the same key until the driver lets its object go.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from .call import CacheOp, CacheUse
from .errors import SkipPipeError

CREATE = "create"
"""The CacheOp that founds a cache; its argument is an empty one of the driver's kind."""
COPY = "copy"
"""The CacheOp that makes another cache of one as it is; its argument is the new one's key."""


class CacheShelf:
    """The caches of one stage, by the driver's key."""

    def __init__(self) -> None:
        self._caches: dict[int, Any] = {}  # Any: transformers' Cache, which need not be installed

    @classmethod
    def of(cls, use: CacheUse) -> CacheShelf:
        """Return one with the caches that ``use`` founds."""
        shelf = cls()
        shelf.apply(use.ops)
        return shelf

    def cache(self, key: int) -> Any:
        """Return the stage's cache for ``key``."""
        if key not in self._caches:
            raise SkipPipeError(
                "a key-value cache was filled by a call that went to another replica of this stage, or to workers that "
                "are gone: begin the generation anew in the step that goes on with it, or use replicas=1"
            )
        return self._caches[key]

    def apply(self, ops: Iterable[CacheOp]) -> None:
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
