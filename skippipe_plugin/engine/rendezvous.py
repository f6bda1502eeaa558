"""The store through which the members of a generation find each other, with waits that can be given up.

A blocked ``TCPStore.wait`` cannot be interrupted and locks its client. Gloo takes a store written in Python, so this
one asks again and again instead, and stops as soon as the generation is aborted.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Final

from .c10d import Store, TCPStore

_FIRST_LOOK_S: Final = 0.0005
_SLOWEST_LOOK_S: Final = 0.02
_REACHED_WITHIN: Final = timedelta(seconds=30)


class DistantStore(Store):
    """A store of another process, reached when it is first asked.

    Where nobody listens any more, as when a generation was given up before this process heard of it, torch tries until
    its time is over and cannot be interrupted: so it is left to who asks, in a thread that nobody needs.

    Args:
        host: Where it is.
        port: The same.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__()
        self._host, self._port = host, port
        self._reached: Store | None = None
        self._reaching = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        """See ``torch.distributed.Store.set``; this and the others raise RuntimeError if it cannot be reached."""
        self._store.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        """See ``torch.distributed.Store.get``."""
        return self._store.get(key)

    def add(self, key: str, amount: int) -> int:
        """See ``torch.distributed.Store.add``."""
        return self._store.add(key, amount)

    def check(self, keys: Sequence[str]) -> bool:
        """See ``torch.distributed.Store.check``."""
        return self._store.check(list(keys))

    @property
    def _store(self) -> Store:
        with self._reaching:
            if self._reached is None:
                self._reached = TCPStore(self._host, self._port, is_master=False, timeout=_REACHED_WITHIN)
            return self._reached


class AbortableStore(Store):
    """The keys of ``store`` under ``prefix``; waits raise as soon as ``aborted`` is set."""

    def __init__(self, store: Store, prefix: str, aborted: threading.Event) -> None:
        super().__init__()
        self._left: Store | None = store
        self._prefix = prefix
        self._aborted = aborted
        self._answered_s = math.inf

    @property
    def idle_s(self) -> float:
        """For how many seconds it has been asked nothing; what is awaited here is asked for again and again."""
        return time.monotonic() - self._answered_s

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        self._answered_s = math.inf
        yield
        self._answered_s = time.monotonic()

    @property
    def _store(self) -> Store:
        if self._left is None:
            raise RuntimeError("the groups of this generation are formed, and its store is closed")
        return self._left

    def leave(self) -> None:
        """Let go of the store, which the group that was formed by it does not need any more."""
        self._left = None

    def set(self, key: str, value: str | bytes) -> None:
        """See ``torch.distributed.Store.set``."""
        with self._asked():
            self._store.set(self._prefix + key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        """Wait for ``key`` and return its value."""
        self.wait([key])
        with self._asked():
            return self._store.get(self._prefix + key)

    def add(self, key: str, amount: int) -> int:
        """See ``torch.distributed.Store.add``."""
        with self._asked():
            return self._store.add(self._prefix + key, amount)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        with self._asked():
            return self._store.check([self._prefix + key for key in keys])

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait for all keys.

        Raises:
            RuntimeError: The generation was aborted. There is no time-out: who waits in vain is told so.
        """
        pause_s = _FIRST_LOOK_S
        while not self.check(keys):
            if self._aborted.wait(pause_s):
                raise RuntimeError(f"the generation was given up while waiting for {list(keys)}")
            pause_s = min(2 * pause_s, _SLOWEST_LOOK_S)
