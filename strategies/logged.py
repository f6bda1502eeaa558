"""``self.log`` while a step runs: what is logged is noted instead, whichever way user code takes to it.

All ways end at the collection of Lightning's results, when Lightning has checked what is logged and found its settings:
an overridden ``log``, ``super().log``, a bound method that an object was given. That takes ten times as long as a note,
for each microbatch; so a call of the module's own ``log``, where nobody has overridden it, is met before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..driver.capture.ordinary import StandIn

_LOG: Final = LightningModule.log
_NAMES: Final = tuple(inspect.signature(_LOG).parameters)[3:]
_METRICS: Final = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


@dataclass(frozen=True, slots=True)
class Logged:
    """One call of ``self.log``, not carried out."""

    name: str
    value: Any
    """What ``self.log`` accepts; tensors as they were then."""
    options: dict[str, Any]
    carry_out: Callable[..., None]
    """Logs, given a name, a value and options."""


Note = Callable[[Logged], None]


@contextmanager
def noting(module: LightningModule, note: Note) -> Iterator[None]:
    """Have ``note`` called with what steps of ``module`` log, and nothing logged."""
    results: Any = module.trainer._results
    if results is None:  # nothing may be logged, and Lightning says so
        yield
        return
    before = vars(results).get("log")
    is_met = "log" not in vars(module) and type(module).log is _LOG
    results.__dict__["log"] = _Collector(results, note)
    if is_met:
        module.__dict__["log"] = StandIn(module, "log", functools.partial(_meet, module))
    try:
        yield
    finally:
        if is_met:
            module.__dict__.pop("log", None)
        if before is None:
            del results.__dict__["log"]
        else:
            results.__dict__["log"] = before


class _Collector:
    """Stands in for the ``log`` of Lightning's results."""

    def __init__(self, results: Any, note: Note) -> None:
        self.note = note
        self._log = functools.partial(type(results).log, results)

    def __call__(self, fx: str, name: str, value: Any, **options: Any) -> None:
        self.note(Logged(name, value, options, functools.partial(self._log, fx)))


def _meet(module: LightningModule, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
    """Stand in for ``module.log``, also after the step, for who has kept it."""
    results: Any = module.trainer._results
    collector = None if results is None else vars(results).get("log")
    if not isinstance(collector, _Collector):
        _LOG(module, name, value, *args, **kwargs)
        return
    if isinstance(value, Tensor):
        value = value.detach().clone()  # user code may go on counting in it
    options = {**kwargs, **dict(zip(_NAMES, args, strict=False))}
    collector.note(Logged(name, value, options, functools.partial(_LOG, module)))


def undo_logs(trainer: Trainer) -> Callable[[], None]:
    """Return a function that takes back what has been logged since."""
    results: Any = trainer._results
    if results is None:
        return lambda: None
    connector = trainer._logger_connector
    kept = {key: (metric, {**vars(metric)}) for key, metric in results.items()}
    around, position = {**vars(results)}, (connector._first_loop_iter, connector._current_fx)
    shown = {name: {**getattr(connector, name)} for name in _METRICS}

    def undo() -> None:
        results.clear()
        for key, (metric, state) in kept.items():
            _refill(vars(metric), state)
            results[key] = metric
        _refill(vars(results), around)
        connector._first_loop_iter, connector._current_fx = position
        for name, values in shown.items():
            _refill(getattr(connector, name), values)

    return undo


def _refill(entries: dict[str, Any], values: dict[str, Any]) -> None:
    entries.clear()
    entries.update(values)
