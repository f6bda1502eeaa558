"""A step of a LightningModule that runs once, on the whole batch, while only its call of the blocks is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ..driver.capture.asking import questions
from ..driver.capture.undo import undo_all
from ..driver.whole_step import WholeTask
from .averaged_log import replaced_log
from .in_reach import in_reach
from .outputs import loss_of


class WholeStep:
    """One call of a step of ``module``, which logs as in one process.

    What a run that may be repeated logs is kept until the step is over; what one logs that is only asked where its
    batch may be cut is dropped.

    Args:
        module: The user's.
        name: Its step.
        args: What Lightning calls it with; the batch first.
        kwargs: The same by name.
        device: The driver's.
    """

    def __init__(
        self,
        module: LightningModule,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self._module = module
        self._name = name
        self._batch, self._rest, self._kwargs = args[0], args[1:], kwargs
        self._device = device
        self._asking = False
        self._real_log = module.log
        self._kept: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        """What was logged, once that is kept."""

    def task(self, seed: int, *, drivers: int, repeats: bool) -> WholeTask:
        """Return what the pipeline has to do."""
        training = self._name == "training_step"
        return WholeTask(
            function=self._run,
            loss_of=loss_of,
            seed=seed,
            training=training,
            name=self._name,
            questions=questions(self._answer, self._batch),
            note_state=self._note_state,
            repeats=repeats,
            share=1 / drivers,
            framed=self._framed,
        )

    @contextmanager
    def _framed(self) -> Iterator[None]:
        with self._module.trainer.precision_plugin.train_step_context(), replaced_log(self._module, _drop):
            yield

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log what the step logs, unless it fails."""
        with replaced_log(self._module, self._log):
            yield
        for args, kwargs in self._kept or ():
            self._module.log(*args, **kwargs)

    def _run(self) -> Any:
        if self._kept is not None:
            self._kept = []
        return self._call(self._batch)

    def _answer(self, batch: Any) -> Any:
        self._asking = True
        try:
            return self._call(batch)
        finally:
            self._asking = False

    def _call(self, batch: Any) -> Any:
        return getattr(self._module, self._name)(batch, *self._rest, **self._kwargs)

    def _note_state(self) -> Callable[[], None]:
        self._kept = []
        return undo_all(self._module, self._device, self._batch, in_reach(self._module.trainer))

    def _log(self, *args: Any, **kwargs: Any) -> None:
        if self._asking:
            return
        if self._kept is None:
            self._real_log(*args, **kwargs)
        else:
            self._kept.append((tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}))


def _drop(*_: Any, **__: Any) -> None:
    """Log nothing."""


def _copied(value: Any) -> Any:
    """Keep a tensor's value, which the user's code may change after it has logged it."""
    return value.detach().clone() if isinstance(value, Tensor) else value
