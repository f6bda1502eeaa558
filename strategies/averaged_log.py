"""``self.log`` inside a microbatched step: collected, merged to what the whole batch would have logged, logged once.

Lightning's own checks and settings hold: what is merged goes through ``self.log``, in the order of the step's calls.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from ..driver.capture.suspend import current_thread
from ..model.asking import Key, Results
from ..model.reductions import MISSING

_NAMES = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx")
Merge = Callable[[Key, list[Any]], Any]
"""Returns the whole batch's result, given its name and the microbatches'."""


class _Entries:
    """What one run of a step logs, by name and how often the name was logged before."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], tuple[Any, dict[str, Any]]] = {}  # Any: what self.log accepts
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs |= dict(zip(_NAMES, args, strict=False))
        if isinstance(value, Metric):
            kwargs["_forward"] = value._forward_cache
        elif isinstance(value, Tensor):
            value = value.detach()
        number = self._counts.get(name, 0)
        self._counts[name] = number + 1
        self.entries[name, number] = (value, kwargs)

    def results(self) -> Results:
        """Return what has to be merged: values, sizes that the user gave, and metrics' last values."""
        found: Results = {}
        for (name, number), (value, kwargs) in self.entries.items():
            if not isinstance(value, Metric):
                found["log", name, number] = value
            elif isinstance(kwargs.get("_forward"), Tensor):
                found["log", name, number] = kwargs["_forward"]
            if kwargs.get("batch_size") is not None:
                found["log", name, number, "batch_size"] = kwargs["batch_size"]
        return found


class AveragedLog:
    """Stands in for ``module.log`` while a step runs.

    Args:
        module: Whose step it is.
        num_microbatches: How many the batch makes.
    """

    def __init__(self, module: LightningModule, num_microbatches: int) -> None:
        self._module = module
        self._entries = [_Entries() for _ in range(num_microbatches)]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Collect instead of logging."""
        with replaced_log(self._module, self._collect):
            yield

    def within(self, microbatch: int, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``function`` such that what it logs counts for ``microbatch``, however it is interleaved."""

        def run() -> Any:
            thread = current_thread()
            assert thread is not None
            thread.label = microbatch
            self._entries[microbatch] = _Entries()  # an attempt that was given up may have logged already
            return function()

        return run

    def results(self) -> list[Results]:
        """Return, by microbatch, what was logged."""
        return [entries.results() for entries in self._entries]

    def replay(self, merge: Merge) -> None:
        """Log what the whole batch would have."""
        results = self.results()
        keys = dict.fromkeys(key for each in self._entries for key in each.entries)
        for name, number in keys:
            value, kwargs = next(each.entries[name, number] for each in self._entries if (name, number) in each.entries)
            kwargs = {key: item for key, item in kwargs.items() if key != "_forward"}

            def merged(key: Key) -> Any:
                parts = [result.get(key, MISSING) for result in results]
                return MISSING if all(part is MISSING for part in parts) else merge(key, parts)

            whole = merged(("log", name, number))
            if (size := merged(("log", name, number, "batch_size"))) is not MISSING:
                kwargs["batch_size"] = size
            if not isinstance(value, Metric):
                value = whole
            elif whole is not MISSING:
                value.__dict__["_forward_cache"] = whole
            self._module.log(name, value, **kwargs)

    def _collect(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        thread = current_thread()
        self._entries[thread.label if thread is not None else 0].add(name, value, args, kwargs)


_noting: contextvars.ContextVar[_Entries] = contextvars.ContextVar("skippipe_noted_log")
"""Where the step that runs now notes what it logs; microbatches may take turns."""


@contextmanager
def noted_log(module: LightningModule) -> Iterator[None]:
    """Let steps log nothing, and note what they would have logged where :func:`noted` says."""
    with replaced_log(module, lambda name, value, *args, **kwargs: _noting.get().add(name, value, args, kwargs)):
        yield


@contextmanager
def replaced_log(module: LightningModule, log: Callable[..., None]) -> Iterator[None]:
    """Let ``module.log`` be another function."""
    before = module.__dict__.get("log")
    module.__dict__["log"] = log
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("log", None)
        else:
            module.__dict__["log"] = before


@contextmanager
def noted() -> Iterator[Callable[[], Results]]:
    """Note what a run of a step logs; gives what tells the results."""
    entries = _Entries()
    token = _noting.set(entries)
    try:
        yield entries.results
    finally:
        _noting.reset(token)
