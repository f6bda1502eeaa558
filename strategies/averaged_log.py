"""``self.log`` inside a microbatched step: collected, merged to what the whole batch would have logged, logged once.

Lightning's own checks and settings hold: what is merged goes on from where it was met, in the order of the calls.
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
from ..model.reductions import MISSING
from ..model.trials import Key, Results
from .logged import Logged, noting

Merge = Callable[[Key, list[Any]], Any]
"""Returns the whole batch's result, given its name and the microbatches'."""


class _Entries:
    """What one run of a step logs, by name and how often the name was logged before."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], Logged] = {}
        self._forward: dict[tuple[str, int], Tensor] = {}
        """What the last update of a metric gave."""
        self._counts: dict[str, int] = {}

    def add(self, logged: Logged) -> None:
        number = self._counts.get(logged.name, 0)
        self._counts[logged.name] = number + 1
        self.entries[logged.name, number] = logged
        forward: Any = logged.value._forward_cache if isinstance(logged.value, Metric) else None
        if isinstance(forward, Tensor):
            self._forward[logged.name, number] = forward

    def results(self) -> Results:
        """Return what has to be merged: values, sizes that the user gave, and metrics' last values."""
        found: Results = {}
        for key, logged in self.entries.items():
            if not isinstance(logged.value, Metric):
                found["log", *key] = logged.value
            elif key in self._forward:
                found["log", *key] = self._forward[key]
            if logged.options.get("batch_size") is not None:
                found["log", *key, "batch_size"] = logged.options["batch_size"]
        return found


class AveragedLog:
    """Collects what a step logs while it runs.

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
        with noting(self._module, self._collect):
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
        for key in keys:
            logged = next(each.entries[key] for each in self._entries if key in each.entries)
            value, options = logged.value, logged.options

            def merged(key: Key) -> Any:
                parts = [result.get(key, MISSING) for result in results]
                return MISSING if all(part is MISSING for part in parts) else merge(key, parts)

            whole = merged(("log", *key))
            if (size := merged(("log", *key, "batch_size"))) is not MISSING:
                options = {**options, "batch_size": size}
            if not isinstance(value, Metric):
                value = whole
            elif whole is not MISSING:
                value.__dict__["_forward_cache"] = whole
            logged.carry_out(logged.name, value, **options)

    def _collect(self, logged: Logged) -> None:
        thread = current_thread()
        self._entries[thread.label if thread is not None else 0].add(logged)


_noting: contextvars.ContextVar[_Entries] = contextvars.ContextVar("skippipe_noted_log")
"""Where the step that runs now notes what it logs; microbatches may take turns."""


@contextmanager
def noted_log(module: LightningModule) -> Iterator[None]:
    """Let steps log nothing, and note what they would have logged where :func:`noted` says."""
    with noting(module, lambda logged: _noting.get().add(logged)):
        yield


@contextmanager
def noted() -> Iterator[Callable[[], Results]]:
    """Note what a run of a step logs; gives what tells the results."""
    entries = _Entries()
    token = _noting.set(entries)
    try:
        yield entries.results
    finally:
        _noting.reset(token)


def has_noted() -> bool:
    """Whether the step that runs now has logged anything, which nobody can read yet."""
    entries = _noting.get(None)
    return entries is not None and bool(entries.entries)
