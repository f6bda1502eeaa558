"""Loops that call the blocks several times before they go back: in one call of the model, or in several calls of it.

From then on the model runs as in one process, once on the whole batch, and each call of the blocks is a graph of its
own (:mod:`.open_calls`). The first call of the model has run otherwise already: it runs once more when its gradients
come, with all as it was when it was made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..driver.capture.growing import sample_counts
from ..driver.capture.remote import is_remote
from ..driver.capture.undo import undo_all
from ..engine.call import Ambient, device_types
from ..engine.errors import SkipPipeError, none_swallowed
from .open_calls import OpenCalls
from .open_step import OpenStep
from .spread import SpreadModel
from .suspended import Train
from .wanted import FirstRuns, with_outputs

log = logging.getLogger(__name__)

_SAID: Final = (
    "the blocks of %s are called several times before a backward. From now on it runs once, on the whole batch, of "
    "which only what enters the blocks is cut; all forwards come before the loss, and those of all calls of the blocks "
    "but the last run once more on the way back"
)
_NOT_NEEDED: Final = "the calls of %s are cut as usual again: no backward went through the first one"
_BATCH: Final = (
    "the blocks are called several times before a backward, so that the model must run once, on the whole batch, and "
    "cannot be cut by microbatches='batch'; leave that out, and only what enters the blocks is cut; or put the inputs "
    "of all calls into one batch, or add the losses before backward"
)


class SeveralCalls:
    """Runs the calls of a loop's model, from :meth:`open` on.

    Args:
        spread: The blocks.
        step: Where their calls wait.
        model: The loop's.
        device: The driver's.
        repeats: Whether interrupted steps are repeated.
    """

    def __init__(
        self, spread: SpreadModel, step: OpenStep, model: nn.Module, device: torch.device, *, repeats: bool
    ) -> None:
        self.is_open = self.is_running = False
        """Whether calls run so; whether one does now."""
        self.was_in_vain = False
        """Whether calls ran so once and need not have: nothing has gone back through the first one."""
        self._spread = spread
        self._step = step
        self._model = model
        self._device = device
        self._calls = OpenCalls(spread, step, repeats=repeats)
        self._firsts = FirstRuns()
        self._was_needed: Callable[[], bool] | None = None
        """Tells whether a backward has gone through what made calls run so; None where that is known."""

    def open(self, seed: int, num_steps: int, batch: object, was_needed: Callable[[], bool] | None = None) -> None:
        """Let calls run so from now on, and say so.

        Args:
            seed: Of the randomness in the blocks, for the present batch.
            num_steps: The optimizer steps so far.
            batch: Stands for that batch.
            was_needed: Tells, when that batch is over, whether a backward has gone through its first call.

        Raises:
            SkipPipeError: By the user's settings they may not.
        """
        if self._spread.settings.microbatches == "batch":
            raise SkipPipeError(_BATCH)
        self.is_open, self._was_needed = True, was_needed
        self._calls.begin((), seed, num_steps, batch)
        log.warning(_SAID, type(self._model).__name__)

    def reconsider(self) -> None:
        """Before a call: let calls run as usual again if nothing has gone back through the one that was not the last.

        The loop has looked at what its first call returned, for instance, and kept it.
        """
        if self._was_needed is not None and self._step.is_free:
            self.is_open, self._was_needed = self._was_needed(), None
            if not self.is_open:
                self.was_in_vain = True
                log.info(_NOT_NEEDED, type(self._model).__name__)

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any, seed: int, num_steps: int) -> Any:
        """Call ``function``, which calls the blocks.

        Args:
            function: The model, or a function of the loop's that calls it.
            args: What it is called with.
            kwargs: The same by name.
            seed: Of the randomness in the blocks.
            num_steps: The optimizer steps so far.
        """
        kind = len(args), frozenset(kwargs), torch.is_grad_enabled(), self._model.training
        undo = self._firsts.undo(kind, lambda: undo_all(self._model, self._device, (args, kwargs)))
        counts, states = sample_counts((args, kwargs)), self._spread.pipeline.states
        last = states.last

        def begin_again() -> None:
            assert undo is not None
            undo()
            states.last = last

        def run() -> Any:
            if self._step.is_free:
                self._calls.begin(counts, seed, num_steps)
            self._calls.expect(counts)
            with none_swallowed(), self._spread.pipeline.open_to(self._calls):
                return function(*args, **kwargs)

        self.is_running = True
        try:
            return with_outputs(self._spread, run, None if undo is None else begin_again, is_noted=True)
        except BaseException:
            self._step.close()
            raise
        finally:
            self.is_running = False


def buffers_as_saved(model: nn.Module) -> AbstractContextManager[None]:
    """Return what code runs in that brings a model's buffers back: graphs may have saved them as they are again."""
    return _unsafe_preserve_version_counter(tuple(buffer for buffer in model.buffers() if not is_remote(buffer)))


def again(train: Train, undo: Callable[[], None], model: nn.Module, device: torch.device, given: Any) -> Train:
    """Return what runs a call of the model once more, with all as it was, and leaves no trace but gradients.

    Args:
        train: Ran it.
        undo: Brings back what it found.
        model: Whose code runs.
        device: The driver's.
        given: What the model was called with.
    """
    ambient = Ambient.current(device_types(device))

    def run(outside: Callable[..., None]) -> None:
        with buffers_as_saved(model):
            bring_back = undo_all(model, device, given)
            undo()
            try:
                with ambient.entered():
                    train(outside)
            finally:
                bring_back()

    return run
