"""PipelineMonitor: what the pipeline did in a training step, as numbers, a picture and a trace.

It decides which steps are measured and where the results go. Measuring is the strategy's, fitting, simulating and
drawing are the plan layer's.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from ..checked import COUNT, checked
from ..driver.recovery.report import RecoveryEvent
from ..schedule import Mark, Schedule, Timeline, draw, fit_costs, simulate
from ..schedule.fit import ran_whole
from ..schedule.picture import require_matplotlib
from ..schedule.timeline import utilisation
from .common import log_now, strategy_of
from .recovery import StageRecovery


@checked(every_n_steps=COUNT)
class PipelineMonitor(Callback):
    """Measure every n-th training step of a pipeline, log its utilisation, and draw it.

    Logs, under names that stay: ``pipeline/utilisation``, the mean share of the step in which the workers ran actions;
    ``pipeline/bubble``, the mean share in which they waited; ``pipeline/makespan_s``, the seconds from the step's first
    action to its last. The picture shows the measured step above the one that the simulator predicts from the step's
    own median costs: where they differ, something other than the schedule cost time. Losses do not change. Steps before
    which :class:`StageRecovery` replaced a worker are drawn too, with a mark that says how.

    Args:
        every_n_steps: Which optimizer steps are measured: the n-th, the 2n-th, and so on. The others cost nothing.
        folder: Where pictures and traces go; the Trainer's ``log_dir``, or else its ``default_root_dir``, when None.
        picture: Whether to write ``pipeline-step<step>.png``; needs ``pip install "skippipe-plugin[plot]"``.
        trace: Whether to write ``pipeline-step<step>.trace.json`` for https://ui.perfetto.dev, with an arrow for each
            message.

    Example:
        >>> from skippipe_plugin.callbacks import PipelineMonitor
        >>> PipelineMonitor(every_n_steps=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        skippipe_plugin.checked.SettingError: every_n_steps=0 is out of range; it is a whole number of at least 1 ...
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        folder: str | PathLike[str] | None = None,
        picture: bool = True,
        trace: bool = False,
    ) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.folder = None if folder is None else Path(folder)
        self.picture = picture
        self.trace = trace
        self._target = Path()
        self._before: Timeline | None = None
        self._sampling = False
        self._num_recovered = 0
        self._last_step = -1
        """The last step that was measured, counted from 1."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy_of(trainer, self)
        if self.picture:
            require_matplotlib()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._target = self.folder or Path(trainer.log_dir or trainer.default_root_dir)
        self._last_step = -1

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step + 1
        strategy = strategy_of(trainer, self)
        self._before, self._num_recovered = strategy.timeline, len(_recoveries(trainer))
        # With accumulation several batches make a step: the first one stands for it.
        self._sampling = step % self.every_n_steps == 0 and step != self._last_step
        if self._sampling:
            self._last_step = step
            strategy.measure_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        recovered = _recoveries(trainer)[self._num_recovered :]
        if not self._sampling and not recovered:
            return
        self._sampling, self._last_step = False, trainer.global_step if recovered else self._last_step
        strategy = strategy_of(trainer, self)
        timeline, schedule = strategy.timeline, strategy.training_schedule
        if timeline is None or timeline is self._before or schedule is None or not timeline.events:
            return  # a further driver, or a step that did not call the blocks
        self._log(trainer, pl_module, utilisation(timeline, schedule), timeline.makespan_s)
        marks = tuple(Mark(event.rank, 0.0, f"{event.source}, {event.seconds:.2f} s") for event in recovered)
        self._write(replace(timeline, marks=marks), schedule)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_step < 0 and trainer.is_global_zero:
            warnings.warn(
                f"PipelineMonitor measured nothing: it samples every {self.every_n_steps} steps, the run ended after "
                f"step {trainer.global_step}; choose a smaller every_n_steps",
                stacklevel=2,
            )

    def _log(self, trainer: Trainer, pl_module: LightningModule, share: float, makespan_s: float) -> None:
        metrics = {"pipeline/utilisation": share, "pipeline/bubble": 1.0 - share, "pipeline/makespan_s": makespan_s}
        log_now(trainer, pl_module, metrics)

    def _write(self, measured: Timeline, schedule: Schedule) -> None:
        if not (self.picture or self.trace):
            return
        self._target.mkdir(parents=True, exist_ok=True)
        stem = f"pipeline-step{self._last_step:06}"
        if self.picture:
            predicted = predict(measured, schedule)
            panels = [measured] if predicted is None else [measured, predicted]
            draw(panels, self._target / f"{stem}.png", title=f"Step {self._last_step}, schedule {schedule.name or '?'}")
        if self.trace:
            (self._target / f"{stem}.trace.json").write_text(json.dumps(measured.chrome_trace()), encoding="utf-8")


def _recoveries(trainer: Trainer) -> list[RecoveryEvent]:
    found: list[RecoveryEvent] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the Trainer's own type lacks it
        if isinstance(callback, StageRecovery):
            found += callback.events
    return found


def predict(measured: Timeline, schedule: Schedule) -> Timeline | None:
    """Simulate a schedule at the median costs of its measured step.

    None when the step did not run the whole schedule (a short last batch): then there is nothing to compare.
    """
    if not ran_whole(measured, schedule):
        return None
    return replace(simulate(schedule, fit_costs(measured, schedule)), label="predicted from its median costs")
