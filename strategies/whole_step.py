"""A step of a LightningModule that runs once, on the whole batch, while only its call of the blocks is cut."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule

from ..driver.capture.asking import questions
from ..driver.capture.token import HiddenToken, check_available
from ..driver.capture.undo import undo_all
from ..driver.whole_step import WholeTask
from ..model.asking import Asking
from ..model.trials import LOSS, Results
from .averaged_log import noted
from .in_reach import in_reach
from .logged import Logged, noting, undo_logs
from .outputs import loss_of
from .scaling import scale_of_backward


class WholeStep:
    """One call of a step of ``module``, which logs as in one process.

    What is logged by a run that is given up, or that is only asked where its batch may be cut, is taken back. What
    other drivers take part in is logged when the step is over: they may run theirs another time.

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
        self.batch, self._rest, self._kwargs = args[0], args[1:], kwargs
        self._device = device
        self._late: list[Logged] = []
        """What is logged when the step is over: with other drivers, and what follows from values that come later."""

    def task(self, seed: int, asking: Asking, *, share: float, repeats: bool) -> WholeTask:
        """Return what the pipeline has to do."""
        training = self._name == "training_step"
        return WholeTask(
            function=self._run,
            loss_of=loss_of,
            seed=seed,
            training=training,
            name=self._name,
            questions=questions(self._call, self.batch),
            note_state=self.note_state,
            repeats=repeats,
            share=share,
            scale=scale_of_backward(self._module.trainer),
            bends=functools.partial(asking.bend, self._name, self.results),
            framed=self._module.trainer.precision_plugin.train_step_context,
        )

    def call(self) -> Any:
        """Run the step as it is."""
        return self._call(self.batch)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log what the step logs; as a decorator for each call, so that one that begins again logs once."""
        with noting(self._module, self._log):
            yield
        for logged in self._late:
            logged.carry_out(logged.name, logged.value, **logged.options)

    def results(self) -> Results:
        """Run the step, which is only asked what its loss is."""
        with noted():
            value = self._call(self.batch)
            check_available(value)
            loss = loss_of(value)
        return {} if loss is None else {LOSS: loss}

    def _run(self) -> Any:
        self._late = []
        result = self._call(self.batch)
        check_available([logged.value for logged in self._late])
        return result

    def _call(self, batch: Any) -> Any:
        return getattr(self._module, self._name)(batch, *self._rest, **self._kwargs)

    def note_state(self) -> Callable[[], None]:
        """Return what takes back all that the step changes from now on."""
        trainer = self._module.trainer
        undo, unlog = undo_all(self._module, self._device, self.batch, in_reach(trainer)), undo_logs(trainer)

        def undo_both() -> None:
            undo()
            unlog()

        return undo_both

    def _log(self, logged: Logged) -> None:
        is_shared = self._module.trainer.world_size > 1 and logged.options.get("sync_dist")
        if is_shared or isinstance(logged.value, HiddenToken) or self._late:  # in their order
            self._late.append(logged)
        else:
            logged.carry_out(logged.name, logged.value, **logged.options)
