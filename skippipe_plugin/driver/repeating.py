"""Run a batch of before once more, without a trace in what belongs to the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..engine.errors import GenerationAborted
from .accumulation import Batch
from .capture.randomness import RandomStates
from .capture.rewind import rewinder
from .whole_step import WholeTask

if TYPE_CHECKING:
    from .pipeline import Pipeline

_TRAINING = "training"


@contextmanager
def repeating(pipeline: Pipeline, batch: Batch) -> Iterator[None]:
    """Let the user's objects be as they were when ``batch`` began, and the training schedule the one it ran by."""
    undo, usual = _noted(pipeline, batch), pipeline.whole_schedules[_TRAINING]
    measured = pipeline.measure_next, pipeline.collect_timeline
    pipeline.measure_next = pipeline.collect_timeline = False
    try:
        # Otherwise the stages are others by now.
        if batch.schedule.placement == usual.placement and batch.schedule != pipeline.schedules[_TRAINING]:
            pipeline.use_schedule(_TRAINING, batch.schedule)
        with torch.inference_mode(False), torch.set_grad_enabled(True), batch.task.framed():
            batch.rewind()
            yield
        if pipeline.whole_schedules[_TRAINING] is not usual:
            pipeline.use_schedule(_TRAINING, usual)
    except GenerationAborted as error:
        pipeline.abort()
        pipeline.links.raise_cause(error.ranks)
        raise
    finally:
        undo()
        pipeline.measure_next, pipeline.collect_timeline = measured
        if pipeline.whole_schedules[_TRAINING] is not usual:  # nobody runs in this generation any more
            pipeline.abort()
            pipeline.use_schedule(_TRAINING, usual)


def _noted(pipeline: Pipeline, batch: Batch) -> Callable[[], None]:
    """Return what brings the user's objects and random states back to what they are now."""
    if isinstance(batch.task, WholeTask):
        return batch.task.note_state()
    assert pipeline.model is not None, "no model is loaded"
    rewind, draws = rewinder(pipeline.model), RandomStates(pipeline.device)

    def undo() -> None:
        rewind()
        draws.set()

    return undo
