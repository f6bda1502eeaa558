"""Iterators that may be asked again for what they have given: code that takes from them can run once more.

What an iterator has given cannot be put back. So where user code runs that may be given up, another stands in its
place, which keeps what is taken and gives it again. Afterwards that gives what is left of this, and leaves its place.
"""

from __future__ import annotations

import io
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from ...engine.errors import SkipPipeError
from .contents import undo_changes
from .randomness import RandomStates

_DRAWS: Final = (
    "an iterator of yours draws random numbers when a step takes from it, and the step was tried with other draws "
    "before: it would go on with other items than in one process. Give it a random generator of its own "
    "(DataLoader(..., generator=torch.Generator()), numpy.random.default_rng(...)), or take from it in "
    "on_train_batch_start or in the loop"
)
_SENT: Final = (
    "a generator of yours is sent a value by a step, which is tried before its first batch; what it makes of it cannot "
    "be taken back. Keep what it knows in an object with attributes instead"
)


@dataclass(slots=True)
class _Taken:
    """One item, or the error in its place."""

    item: Any  # Any: the user's
    error: Exception | None
    undo: Callable[[], None]
    drew: tuple[RandomStates, RandomStates] | None
    """The random states before and after it was taken, if taking it changed them."""
    taker: int
    """Who watched."""


class Replayed(Iterator[Any]):  # Any: whatever the user's iterator gives
    """Stands in for an iterator.

    Args:
        source: The iterator.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._skippipe_source = source
        self._skippipe_places: list[Callable[[Any, Any], None]] = []
        self._skippipe_items: deque[_Taken] = deque()
        self._skippipe_position = 0
        self._skippipe_dropped = 0
        """So many items are no longer kept; positions that others know are counted from the first item of all."""
        self._skippipe_watchers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        """Who may want to rewind it, and to where."""

    def __next__(self) -> Any:
        if self._skippipe_position < len(self._skippipe_items):
            return self._skippipe_again()
        if not len(self._skippipe_watchers):
            leave(self)
            return next(self._skippipe_source)
        return self._skippipe_take()

    def stand_in(self, put: Callable[[Any, Any], None]) -> None:
        """Take one of the iterator's places: ``put`` is called with what is there and what shall be."""
        self._skippipe_places.append(put)
        put(self._skippipe_source, self)

    def _skippipe_again(self) -> Any:
        taken = self._skippipe_items[self._skippipe_position]
        if taken.drew is not None:
            before, after = taken.drew
            if before.are_those(RandomStates()):
                after.set()
            elif taken.taker not in {id(each) for each in self._skippipe_watchers}:
                raise SkipPipeError(_DRAWS)
        self._skippipe_position += 1
        return _given(taken)

    def _skippipe_take(self) -> Any:
        before, item, error = RandomStates(), None, None
        try:
            with torch._C.DisableTorchFunction():  # a step that is tried runs under a mode of ours
                item = next(self._skippipe_source)
        except Exception as raised:
            error = raised
        after = RandomStates()
        drew = None if before.are_those(after) else (before, after)
        taker = id(next(iter(self._skippipe_watchers)))
        taken = _Taken(item, error, undo_changes(item), drew, taker)
        self._skippipe_items.append(taken)
        self._skippipe_position += 1
        return _given(taken)

    def send(self, value: Any) -> Any:
        """Answer as a generator that is sent nothing; what it is sent could not be taken back."""
        if value is None:
            return next(self)
        if len(self._skippipe_watchers) or self._skippipe_position < len(self._skippipe_items):
            raise SkipPipeError(_SENT)
        leave(self)
        return self._skippipe_source.send(value)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_skippipe"):
            raise AttributeError(name)
        return getattr(self._skippipe_source, name)

    def __len__(self) -> int:
        return len(self._skippipe_source)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self._skippipe_source)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one who watches has found an iterator."""

    iterator: Replayed
    mark: int
    name: str

    def rewind(self) -> None:
        """Let it give again what it gave since."""
        self.iterator._skippipe_position = self.mark - self.iterator._skippipe_dropped
        for taken in self.iterator._skippipe_items:
            taken.undo()

    def num_taken(self) -> int:
        """Return how many were taken since."""
        return self.iterator._skippipe_dropped + self.iterator._skippipe_position - self.mark

    def release(self, watcher: object) -> None:
        """Watch no longer; what nobody has taken from is put back."""
        self.iterator._skippipe_watchers.pop(watcher, None)
        if not self.iterator._skippipe_items:
            leave(self.iterator)


def leave(iterator: Replayed) -> None:
    """Put what it stands in for back into its places."""
    for put in iterator._skippipe_places:
        put(iterator, iterator._skippipe_source)


def watched(iterator: Replayed, watcher: object, name: str) -> Place:
    """Let an iterator keep what it gives as long as ``watcher`` lives."""
    mark = iterator._skippipe_dropped + iterator._skippipe_position
    for _ in range(min([mark, *iterator._skippipe_watchers.values()]) - iterator._skippipe_dropped):
        iterator._skippipe_items.popleft()
        iterator._skippipe_dropped += 1
        iterator._skippipe_position -= 1
    iterator._skippipe_watchers[watcher] = mark
    return Place(iterator, mark, name)


def is_opaque(value: Any) -> bool:
    """Whether ``value`` is an iterator without attributes of the user's, which could be noted instead.

    What stands for a result that is on a worker is none: it has every method, to refuse it.
    """
    kind = type(value)
    if not hasattr(kind, "__next__") or isinstance(value, io.IOBase) or kind.__module__.startswith("skippipe_plugin."):
        return False
    return not hasattr(value, "__dict__") or kind.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))


def _given(taken: _Taken) -> Any:
    if taken.error is not None:
        raise taken.error
    return taken.item
