"""An Accelerator whose model runs as a pipeline; the other processes of a launcher become its workers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState

from ..checked import checked
from ..engine.errors import SkipPipeError
from ..job.job import worker_job
from ..job.launched import RANK_VARIABLES, read_launcher
from ..model.loop_config import SkipPipeConfig
from .pipe import SkipPipe


@checked()
class SkipPipeAccelerator(Accelerator):  # type: ignore[misc]
    """Takes the place of ``Accelerator()`` in a training loop, one line changed.

    In the first process the loop runs as if there were no other: ``num_processes`` is 1, and data, trackers and
    checkpoints are those of one process. The blocks of the model that ``prepare`` gets are spread over workers, which
    this process starts itself. Under a launcher (``accelerate launch``, ``torchrun``) the other processes become the
    workers: there this call serves until the first process ends, and then ends the process, so that nothing after it in
    the script runs more than once.

    Args:
        config: Settings; by default those of the environment, see :meth:`SkipPipeConfig.from_environment`.
        positional: Accelerator's.
        arguments: Settings by name (``skip_ratio=0.25``), which come before ``config``; all others are Accelerator's.

    Raises:
        ValueError: A setting cannot be, or does not fit the number of processes.
        SkipPipeError: accelerate was set up for several processes before.
    """

    def __init__(self, *positional: Any, config: SkipPipeConfig | None = None, **arguments: Any) -> None:
        own = {name: arguments.pop(name) for name in SkipPipeConfig.names() & arguments.keys()}
        config = SkipPipeConfig.from_environment(**own) if config is None else dataclasses.replace(config, **own)
        launcher, num_processes = read_launcher(os.environ)
        if num_processes is not None:
            config.stages_of(num_processes)  # what does not fit is an error in every process
        if launcher is not None and launcher.rank > 0:
            worker_job(launcher, config.network).serve_until_exit()
            raise SystemExit(0)
        _check_state()
        with _alone():
            super().__init__(*positional, **arguments)
        self.skippipe = SkipPipe(self, config=config)
        """What runs the model: timelines, recoveries, worker processes."""
        self.skippipe.open(launcher, num_processes)


def _check_state() -> None:
    if PartialState._shared_state and PartialState().num_processes > 1:
        raise SkipPipeError(
            f"accelerate was set up for {PartialState().num_processes} processes before SkipPipeAccelerator was made. "
            "Make it first (before Accelerator(), PartialState() or TrainingArguments), or start one process"
        )


@contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher from accelerate, which would distribute over its processes."""
    hidden = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden
