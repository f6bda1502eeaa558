"""What a step reads of where training is: epochs, steps, the last batch. What it does may depend on it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from lightning.pytorch import Trainer

from ..model.answers import Clock
from .averaged_log import has_noted

_METRICS: Final = ("callback_metrics", "logged_metrics", "progress_bar_metrics")
_HANDS: Final = ("current_epoch", "global_step", "is_last_batch", "sanity_checking", *_METRICS)
_BATCH_INDEX: Final = "batch_idx"
_OWN_LOG: Final = "what it has logged itself"
_READING: Final = tuple(
    f"__{name}__"
    for name in (
        *("eq", "ne", "lt", "le", "gt", "ge", "bool", "hash", "index", "int", "float", "str", "repr", "format"),
        *("add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod", "floordiv", "rfloordiv", "truediv", "rtruediv"),
        *("pow", "rpow", "neg", "abs", "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rshift", "divmod"),
    )
)


class TrainersClock(Clock):
    """Notes what steps read of a Trainer, and of the number of their batch.

    Args:
        trainer: Whose it is.
    """

    fast = frozenset({"global_step", _BATCH_INDEX, _OWN_LOG})

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._trainer = trainer

    def shows(self, names: Collection[str]) -> Hashable:
        """See :meth:`skippipe_plugin.model.answers.Clock.shows`."""
        shown = [(name, getattr(self._trainer, name)) for name in sorted(names)]
        return tuple((name, _metrics(value) if name in _METRICS else value) for name, value in shown)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what is read of the Trainer meanwhile."""
        kind = type(self._trainer)
        self._trainer.__dict__[_NOTES] = self.reads
        self._trainer.__class__ = _noting(kind)  # type: ignore[arg-type] # classes are hashable
        try:
            yield
        finally:
            self._trainer.__class__ = kind
            del self._trainer.__dict__[_NOTES]

    def batch_index(self, number: Any) -> Any:
        """See :meth:`skippipe_plugin.model.answers.Clock.batch_index`: its being read is noted."""
        if type(number) is not int:
            return number
        noted = _Index(number)
        noted.reads = self.reads
        return noted


def _metrics(values: Mapping[str, Any]) -> Hashable:
    return tuple((name, float(value)) for name, value in values.items())


_NOTES: Final = "_skippipe_reads"


@functools.cache
def _noting(kind: type[Trainer]) -> type[Trainer]:
    """Return a class of Trainers that note which of their hands are read."""

    def noted(name: str) -> property:
        real: Any = getattr(kind, name)

        def read(trainer: Trainer) -> Any:
            trainer.__dict__[_NOTES].add(_OWN_LOG if name in _METRICS and has_noted() else name)
            return real.__get__(trainer, kind)

        return property(read, getattr(real, "fset", None))

    return type(kind.__name__, (kind,), {name: noted(name) for name in _HANDS})


class _Index(int):
    """The number of a batch, which notes that it is read."""

    reads: set[str]


def _read(name: str) -> Any:
    real = getattr(int, name)

    def method(self: _Index, *args: Any) -> Any:
        self.reads.add(_BATCH_INDEX)
        return real(int.__int__(self), *args)

    return method


for _name in _READING:
    setattr(_Index, _name, _read(_name))
