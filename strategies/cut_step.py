"""A step of a LightningModule that runs once per microbatch, and whose results are then those of the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ..driver.capture.batches import Cut
from ..driver.steps import StepTask
from ..model.answers import Clock
from ..model.asking import Asking
from ..model.kinds import detail_of, form_of, kind_of
from ..model.merging import Agree, Merging
from ..model.settings import CutWhere
from ..model.shares import loss_weights
from ..model.spread import SpreadModel
from ..model.trials import LOSS, Question, Results
from ..model.weight import MicrobatchWeight, view_of
from .averaged_log import AveragedLog, noted, noted_log
from .clock import TrainersClock
from .in_reach import in_reach
from .outputs import loss_of, with_loss, without_loss
from .scaling import scale_of_backward
from .sections import shared_sections

_OUTPUT = ("output",)


class CutStep:
    """One call of a step of ``module``.

    Args:
        module: The user's.
        name: Its step.
        batch: What is cut.
        cut: The microbatches.
        rest: The step's other arguments.
        kwargs: The same by name.
        weight: What a microbatch weighs, by the user.
    """

    def __init__(
        self,
        module: LightningModule,
        name: str,
        batch: Any,
        cut: Cut,
        rest: Sequence[Any],
        kwargs: Mapping[str, Any],
        weight: MicrobatchWeight | None,
    ) -> None:
        self.module = module
        self._name = name
        self._training = name == "training_step"
        self._step: Callable[..., Any] = getattr(module, name)
        self._batch, self._cut = batch, cut
        self._rest, self._kwargs = rest, kwargs
        self._log = AveragedLog(module, len(cut.sizes))
        self._weight = weight

    def prepared(self, asking: Asking, where: CutWhere, agree: Agree, *, may_be_cut: bool = True) -> PreparedStep:
        """Find out how the step's results merge, and whether it must run once, on the whole batch."""
        batch, sizes, rest = self._batch, self._cut.sizes, self._rest
        question = Question(
            kind=(self._name, self.module.training, len(rest), kind_of(batch), rest[1:], tuple(self._kwargs)),
            detail=(detail_of(batch), form_of(sizes)),
            view=view_of(batch, self._cut.pieces, sizes, self._weight),
            whole=functools.partial(self._results, asking.clock, batch),
            pieces=[functools.partial(self._results, asking.clock, piece) for piece in self._cut.pieces],
            uncut=self._cut.refusal if self._training else "",
        )
        merging = Merging(asking, question, self._weight)
        is_cut = may_be_cut and not merging.goes_whole(where, self._name, agree)
        return PreparedStep(self, merging, is_cut)

    def task(self, merging: Merging, seed: int, rewind: Callable[[], None], agree: Agree) -> StepTask:
        """Return what the pipeline has to do."""
        question, view = merging.question, merging.question.view
        functions = [
            self._log.within(index, functools.partial(self._step, piece, *self._rest, **self._kwargs))
            for index, piece in enumerate(view.pieces)
        ]
        if not self._training:
            weights = [1 / len(functions)] * len(functions)
            return StepTask(functions, weights, loss_of, seed, training=False, sizes=view.sizes, rewind=rewind)
        found = loss_weights(merging, agree)
        return StepTask(
            functions,
            found.weights,
            loss_of,
            seed,
            training=True,
            sizes=view.sizes,
            rewind=rewind,
            loss_is_sum=found.is_sum,
            share=found.share,
            scale=scale_of_backward(self.module.trainer),
            bends=functools.partial(merging.asking.bend, question.kind, question.whole),
            framed=self._framed,
        )

    @contextmanager
    def _framed(self) -> Iterator[None]:
        precision = self.module.trainer.precision_plugin
        with precision.train_step_context(), self.logging(), shared_sections(self.module):
            yield

    def logging(self) -> AbstractContextManager[None]:
        """Collect what the step logs."""
        return self._log.installed()

    def finish(self, merging: Merging, values: Sequence[Any], loss: Tensor | None = None) -> Any:
        """Log what the batch would have, and return what the step would have returned for it."""
        self._log.replay(merging.merged)
        if not self._training:
            return merging.merged(_OUTPUT, list(values))
        rests = [without_loss(value) for value in values]
        if loss is None or rests[0] is None:
            return loss
        return with_loss(merging.merged(_OUTPUT, rests), loss)

    def _results(self, clock: Clock, batch: Any) -> Results:
        rest = [*map(clock.batch_index, self._rest[:1]), *self._rest[1:]]
        kwargs = {**self._kwargs}
        if "batch_idx" in kwargs:
            kwargs["batch_idx"] = clock.batch_index(kwargs["batch_idx"])
        with noted() as logged:
            value = self._step(batch, *rest, **kwargs)
        return _by_key(logged(), value, training=self._training)


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """A step of which is known how its results merge."""

    step: CutStep
    merging: Merging
    is_cut: bool
    """Whether it runs once for each microbatch."""

    @property
    def is_tried(self) -> bool:
        """Whether it has run as it will be run, so that what it calls is known."""
        return self.is_cut and self.merging.answer is not None

    def run(
        self,
        pipeline: Callable[[StepTask], tuple[list[Any], Tensor | None]],
        seed: int,
        rewind: Callable[[], None],
        agree: Agree,
    ) -> Any:
        """Let the pipeline run it, cut, and return what it would have returned for the batch."""
        task = self.step.task(self.merging, seed, rewind, agree)
        with self.step.logging(), shared_sections(self.step.module):
            values, loss = pipeline(task)
        return self.step.finish(self.merging, values, loss)


def prepare(
    make: Callable[[Cut], CutStep],
    name: str,
    spread: SpreadModel,
    cut: Callable[..., Cut],
    asking: Asking,
    agree: Agree,
) -> PreparedStep | None:
    """Find out how a step merges; None where it runs once by the user's settings, and nobody else has a part in it.

    Where several drivers train, what one's batch weighs among theirs has to be known all the same.

    Args:
        make: Makes the step of a cut batch.
        name: Which one it is.
        spread: The blocks.
        cut: Cuts the batch into so many microbatches.
        asking: Finds out.
        agree: Gives every driver what each of them has.
    """
    settings, training = spread.settings, name == "training_step"
    if not spread.runs_whole:
        may_stay = not training or settings.microbatches != "batch"
        step = make(cut(len(spread.pipeline.microbatches), may_stay=may_stay))
        return step.prepared(asking, settings.microbatches, agree)
    if settings.drivers == 1 or not training:
        return None
    return make(cut(2, may_stay=True)).prepared(asking, settings.microbatches, agree, may_be_cut=False)


def asking_of(module: LightningModule, spread: SpreadModel, device: torch.device) -> Asking:
    """Return what finds out how the steps of ``module`` reduce."""
    weighted = callable(spread.settings.microbatch_weight)
    clock, own = TrainersClock(module.trainer), vars(LightningModule())
    quiet = functools.partial(_asked, module, clock)
    others = functools.partial(in_reach, module.trainer)
    return Asking(spread, module, device, weighted=weighted, quiet=quiet, clock=clock, ignored=own, others=others)


@contextmanager
def _asked(module: LightningModule, clock: TrainersClock) -> Iterator[None]:
    """Frame steps that are only asked."""
    with silent(module.trainer), noted_log(module), shared_sections(module), clock.noted():
        yield


def _by_key(results: Results, value: Any, *, training: bool) -> Results:
    if not training:
        return {**results, _OUTPUT: value}
    loss, rest = loss_of(value), without_loss(value)
    found = {LOSS: loss} if loss is not None else {}
    return {**found, **results, **({_OUTPUT: rest} if rest is not None else {})}


@contextmanager
def silent(trainer: Trainer) -> Iterator[None]:
    """Let a step that is only asked reach no logger, and stop nothing."""
    loggers, stops = trainer._loggers, trainer.should_stop
    silence: Any = _Silence()
    trainer._loggers = [silence] * len(loggers)
    try:
        yield
    finally:
        trainer._loggers, trainer.should_stop = loggers, stops


class _Silence:
    """Takes every call and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        return None
