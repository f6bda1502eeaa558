"""What happens when a loop calls the model: the batch is cut into microbatches, which run through the pipeline.

A training call runs forward and backward of all microbatches if the model computes its loss itself, and their
forwards otherwise; then the backwards follow with the loop's. Other calls run without gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..driver.block_states import NotedCall
from ..driver.capture.asking import questions
from ..driver.capture.batches import Cutter
from ..driver.capture.caches import is_cache
from ..driver.capture.graphs import Ends
from ..driver.capture.rewind import rewinder
from ..driver.capture.suspend import current_thread
from ..driver.capture.token import check_available
from ..driver.capture.undo import undo_all
from ..driver.steps import StepTask
from ..driver.unfinished import CalledTwice, Parked
from ..driver.whole_step import WholeTask
from ..engine.call import block_seed
from ..engine.control.values import States
from ..engine.errors import SkipPipeError
from .asking import Asking
from .entrance import Entrance
from .kinds import detail_of, form_of, kind_of
from .merging import Merging
from .one_call import Call, CutCall, asks_for_cache, code_of, given
from .open_step import OpenStep
from .outputs import (
    find_loss,
    guarded,
    map_tensors,
    with_closed_caches,
    with_loss,
    without_caches,
)
from .parked import train_again
from .several import SeveralCalls, again, buffers_as_saved
from .shares import loss_weights
from .spread import SpreadModel
from .suspended import Train
from .trials import LOSS, Question, Results
from .untrained import Untrained
from .wanted import with_outputs
from .weight import MicrobatchWeight, view_of

_HAS_A_LOSS: Final = (
    "backward went through an output of the model other than its loss, but the model computed a loss itself, so the "
    "backward of all microbatches ran when it was called. Use the returned loss alone; call the model without "
    "labels and compute the whole loss from its outputs; or use microbatches='stack', with which the model runs once "
    "on the whole batch, and all of it goes back with the loop's backward"
)
_OUTPUT: Final = ("output",)
Kind = tuple[Hashable, int, frozenset[str]]
"""Of a call: the code that runs, how many positional arguments there are, the names of the others."""


class _LossIsOutside(Exception):
    """No error: the model returned no loss, so the call goes the other way."""


class ModelCalls:
    """Stands in for the ``forward`` of a model whose blocks are spread.

    Args:
        spread: The blocks.
        model: The model that is called.
        device: The driver's device.
        rewinds: Whether interrupted steps are repeated.
        weight: What a microbatch weighs, by the user.
        scale: Tells what the backward of a loss that the model returns is expected to bring.
        is_scaled: Whether that is with a loss scaler.
    """

    def __init__(
        self,
        spread: SpreadModel,
        model: nn.Module,
        device: torch.device,
        *,
        rewinds: bool,
        weight: MicrobatchWeight | None = None,
        scale: Callable[[], float] = lambda: 1.0,
        is_scaled: bool = False,
    ) -> None:
        self.num_calls = 0
        """The training calls so far; dropout in the blocks is seeded by it."""
        self.num_optimizer_steps = 0
        self.open_step = OpenStep(spread, model, device)
        """The training calls whose backward is still to come."""
        self._several = SeveralCalls(spread, self.open_step, model, device, repeats=rewinds)
        self._spread = spread
        self._model = model
        self._device = device
        self._rewinds = rewinds
        self._forward: Callable[..., Any] = model.forward
        self._function = self._forward
        """What runs for each microbatch: the model, or a function of the loop's that calls it."""
        self._cutter = Cutter()
        self._outside: dict[Kind, bool] = {}
        """By kind of call: whether it returns no loss."""
        self._seen: set[Kind] = set()
        """The kinds of which that is known."""
        self._weight = weight
        self._scale = scale
        self._is_scaled = is_scaled
        self._entrance = Entrance()
        """Of the call under way."""
        self._noted: NotedCall | None = None
        """That call, if it may run once more."""
        self._states: States | None = None
        """What it wants of the blocks' states."""
        self._batch = object()
        """Stands for the batch under way, all of whose calls take the same paths."""
        self._asking = Asking(spread, model, device, weighted=callable(weight))
        self._untrained = Untrained(model, self._asking)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model would return for the whole batch."""
        if current_thread() is not None or self._several.is_running:
            return self._forward(*args, **kwargs)
        self._several.reconsider()
        if not self._several.is_open and (was_needed := self.open_step.repeat_last()) is not None:
            self._open_to_several(was_needed)
        if self._model.training and (torch.is_grad_enabled() or self._is_open_to(args, kwargs)):
            return self._train(args, kwargs)
        return self._evaluate(args, kwargs)

    def _is_open_to(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call without gradients runs as others of its batch do; one that fills caches does not."""
        caches = any(is_cache(value) for value in (*args, *kwargs.values())) or asks_for_cache(kwargs)
        return self._several.is_open and not caches

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``function``, which calls the model, would return for the whole batch."""
        if current_thread() is not None or self._several.is_running:
            return function(*args, **kwargs)
        self._function = function
        try:
            return self(*args, **kwargs)
        finally:
            self._function = self._forward

    def count_optimizer_step(self) -> None:
        """Note that the optimizer has stepped, which is what a skip ratio over time follows."""
        self.num_optimizer_steps += 1

    def state(self) -> dict[str, Any]:
        """Return what a resumed run continues counting from."""
        return {"calls": self.num_calls, "optimizer_steps": self.num_optimizer_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.num_calls, self.num_optimizer_steps = state["calls"], state["optimizer_steps"]

    def close(self) -> None:
        """Give up what is open."""
        self.open_step.close()

    # ------------------------------------------------------------- training

    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._several.is_open:
            return self._train_open(args, kwargs)
        self.open_step.begin()
        self._begin()
        self._entrance = Entrance()
        entered = self._entrance.enter(args, kwargs)
        kind = code_of(self._function), len(args), frozenset(kwargs)
        undo = undo_all(self._model, self._device, entered) if kind not in self._seen else None
        cut = self._cut(*entered)
        if cut is None and self._looks_outside(kind, *entered):
            self._outside[kind] = True
        if self._asking.most_calls > 1:
            self._open_to_several()
            return self._train_open(args, kwargs)
        try:
            return self._train_closed(kind, cut, *entered, undo)
        except CalledTwice:
            if undo is None:
                raise
            undo()
            self._open_to_several()
            return self._train_open(args, kwargs)

    def _open_to_several(self, was_needed: Callable[[], bool] | None = None) -> None:
        self._several.open(self._seed(), self.num_optimizer_steps, self._batch, was_needed)

    def _train_closed(
        self,
        kind: Kind,
        cut: tuple[CutCall, Merging] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        undo: Callable[[], None] | None,
    ) -> Any:
        self._seen.add(kind)
        pipeline = self._spread.pipeline
        keeps = undo is not None or pipeline.states.has_buffers or pipeline.proxies.book.keeps
        self._noted = pipeline.states.call() if keeps else None
        self._states = None if self._noted is None else self._noted.next()
        self.num_calls += 1
        self._batch = object()
        if cut is None:
            return self._train_whole(args, kwargs, undo)
        batch, merging = cut
        rewind = rewinder(self._model) if self._rewinds or kind not in self._outside else _nothing
        rewind = self._entrance.undone_with(rewind)
        if not self._outside.setdefault(kind, False):
            try:
                return self._train_inside(batch, merging, rewind, undo)
            except _LossIsOutside:
                rewind()
                self._outside[kind] = True
        return self._train_outside(batch, merging, rewind, undo)

    def _begin(self) -> None:
        if self._spread.attached is not None:
            self._spread.attached.begin_step(self.num_optimizer_steps)

    def _train_open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model runs as in one process; each of its calls of the blocks is a graph of its own."""
        if torch.is_grad_enabled():
            self._begin()
            self.num_calls += 1
        return self._several.run(self._function, args, kwargs, self._seed(), self.num_optimizer_steps)

    def _spare(self, undo: Callable[[], None] | None, given: Any, train: Train) -> Train | None:
        """Return what runs the call that is made once more, should another one follow; None where nothing may."""
        if undo is None:
            return None
        then, noted = (self._function, self._entrance, self.num_calls, self._batch), self._noted
        assert noted is not None, "the first of its kind"

        def run(outside: Callable[..., None]) -> None:
            now = self._function, self._entrance, self.num_calls, self._batch, self._states
            self._function, self._entrance, self.num_calls, self._batch, self._states = *then, noted.next()
            try:
                train(outside)
            finally:
                self._function, self._entrance, self.num_calls, self._batch, self._states = now

        return again(run, undo, self._model, self._device, given)

    def _train_inside(
        self, batch: CutCall, merging: Merging, rewind: Callable[[], None], undo: Callable[[], None] | None
    ) -> Any:
        """The model returns its loss: the whole step runs now, and the loss's backward only adds its gradients."""
        if merging.answer is not None and LOSS not in merging.answer.plans and not merging.answer.failure:
            raise _LossIsOutside
        found = loss_weights(merging)
        functions = [functools.partial(self._run_with_loss, call) for call in batch.calls]
        task = StepTask(
            functions,
            found.weights,
            lambda value: value[1],
            self._seed(),
            training=True,
            sizes=batch.sizes,
            rewind=rewind,
            loss_is_sum=found.is_sum,
            scale=self._scale(),
            bends=functools.partial(self._asking.bend, merging.question.kind, merging.question.whole),
        )
        values, loss = self._spread.train(task, self.num_optimizer_steps, self._batch, states=self._states)
        assert loss is not None
        losses = functools.partial(self._run_losses, batch, found.weights, rewind)
        spare = self._spare(undo, batch.calls, losses)
        outputs = [map_tensors(torch.Tensor.detach, output) for output, _ in values]
        merged = guarded(self._merged(merging, outputs), _HAS_A_LOSS)
        return with_loss(merged, self.open_step.watched(self._entrance, loss, merged, spare, len(functions)))

    def _merged(self, merging: Merging, outputs: Sequence[Any]) -> Any:
        """Return the whole batch's output, whose loss is left to the caller."""
        if len(outputs) == 1:
            return outputs[0]
        merged = merging.merged(_OUTPUT, [_without_loss(without_caches(output)) for output in outputs])
        return with_closed_caches(merged, _without_loss(outputs[0]))

    def _run_with_loss(self, call: Call) -> tuple[Any, Tensor]:
        args, kwargs = call
        output = self._function(*args, **kwargs)
        loss = find_loss(output)
        if loss is None:
            raise _LossIsOutside
        if not self._is_scaled:
            _check_scaling(loss.device)
        return output, loss

    def _loss_alone(self, call: Call) -> Tensor:
        return self._run_with_loss(call)[1].reshape(())

    def _train_outside(
        self, batch: CutCall, merging: Merging, rewind: Callable[[], None], undo: Callable[[], None] | None
    ) -> Any:
        """The loop computes the loss: after its forwards the step waits for the gradients of the outputs."""
        function = self._function
        functions = [functools.partial(function, *args, **kwargs) for args, kwargs in batch.calls]
        train = functools.partial(self._run_outside, batch, functions, rewind)
        return self._hand_out(train, functools.partial(self._merged, merging), self._spare(undo, batch.calls, train))

    def _hand_out(
        self, train: Train, merge: Callable[[list[Any]], Any], spare: Train | None, *, draws_on: bool = False
    ) -> Any:
        what = type(self._model).__name__
        late: Callable[[Parked], Train] | None = None
        if not self._several.was_in_vain:
            steps, noted = self.num_optimizer_steps, self._noted
            late = functools.partial(train_again, self._spread, steps, self._batch, noted, self._rewinds)
        return self.open_step.hand_out(
            self._entrance, train, merge, what=what, draws_on=draws_on, spare=spare, late=late
        )

    def _run_losses(
        self, batch: CutCall, weights: Sequence[float], rewind: Callable[[], None], outside: Callable[..., None]
    ) -> None:
        """Run a step whose loss the model returns, once more: the gradient of the batch's loss is known."""

        def weighted(call: Call, weight: float) -> Tensor:
            return self._loss_alone(call) * weight

        pairs = zip(batch.calls, weights, strict=True)
        functions = [functools.partial(weighted, call, weight) for call, weight in pairs]
        self._run_outside(batch, functions, rewind, outside)

    def _run_outside(
        self,
        batch: CutCall,
        functions: Sequence[Callable[[], Any]],
        rewind: Callable[[], None],
        outside: Callable[..., None],
    ) -> None:
        shares = [size / sum(batch.sizes) for size in batch.sizes]
        task = StepTask(
            functions,
            shares,
            lambda _: None,
            self._seed(),
            training=True,
            sizes=batch.sizes,
            rewind=rewind,
            outside=outside,
        )
        self._spread.train(task, self.num_optimizer_steps, self._batch, states=self._states)

    def _looks_outside(self, kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Ask a call of a new kind that runs once whether its model returns no loss: no step need be given up then."""
        if kind in self._seen or self._outside.get(kind):  # a step that is given up would count in buffers
            return False
        asked = functools.partial(self._results, self._function, (args, kwargs))
        given = with_outputs(self._spread, lambda: self._asking.look(asked, (args, kwargs)))
        return given is not None and LOSS not in given

    def _train_whole(self, args: tuple[Any, ...], kwargs: dict[str, Any], undo: Callable[[], None] | None) -> Any:
        """The model runs once on the whole batch; only what enters its blocks is cut.

        A loss that it returns goes back with the loop's own, like its other outputs and whatever else it has left.
        """
        run = functools.partial(self._run_whole_outside, args, kwargs)
        spare = self._spare(undo, (args, kwargs), run)
        return self._hand_out(run, lambda outputs: outputs[0], spare, draws_on=True)

    def _run_whole_outside(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outside: Callable[[Sequence[Any], Ends, Callable[[], Parked | None]], None],
    ) -> None:
        function: Callable[[], Any] = functools.partial(self._function, *args, **kwargs)
        task = self._whole_task(function, args, kwargs, outside=outside)
        self._spread.train(task, self.num_optimizer_steps, self._batch, states=self._states)

    def _whole_task(
        self, function: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any
    ) -> WholeTask:
        whole = self._function
        return WholeTask(
            function=function,
            seed=self._seed(),
            name="training" if options else "evaluation",
            training=bool(options),
            questions=questions(lambda batch: whole(*batch[0], **batch[1]), (args, kwargs)),
            note_state=self._note_state(args, kwargs),
            repeats=self._rewinds,
            **{"loss_of": lambda _: None, **options},
        )

    def _note_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Callable[[], None]]:
        entrance = self._entrance
        return lambda: entrance.undone_with(undo_all(self._model, self._device, (args, kwargs)))

    # ----------------------------------------------------------- evaluation

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with nullcontext() if self.open_step.is_free else buffers_as_saved(self._model):
            output = self._evaluated(args, kwargs)
        if not torch.is_grad_enabled() or any(is_cache(value) for value in (*args, *kwargs.values())):
            return output
        kind = code_of(self._function), len(args), frozenset(kwargs)
        call = functools.partial(self._function, *args, **kwargs)
        return self._untrained.marked(output, kind, call, (args, kwargs))

    def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        why = "a call of the model without gradients or in eval mode"
        if self._several.is_open:
            self.open_step.make_room(why)
        else:
            self.open_step.settle(why)
        cut = self._cut(args, kwargs, training=False)
        if cut is None:
            whole = self._whole_task(functools.partial(self._function, *args, **kwargs), args, kwargs)
            kind = code_of(self._function), -1 - len(args), frozenset(kwargs)
            undo = None if kind in self._seen else undo_all(self._model, self._device, (args, kwargs))
            self._seen.add(kind)
            with torch.no_grad():
                return with_outputs(self._spread, lambda: self._spread.evaluate(whole)[0], undo)
        batch, merging = cut
        functions = [functools.partial(self._function, *own, **named) for own, named in batch.calls]
        shares = [1 / len(functions)] * len(functions)
        rewind = rewinder(self._model) if self._rewinds else _nothing
        task = StepTask(
            functions, shares, lambda _: None, self._seed(), training=False, sizes=batch.sizes, rewind=rewind
        )
        with torch.no_grad():
            outputs = self._spread.evaluate(task)
            merged = self._merged(merging, outputs)
            losses = [loss for output in outputs if (loss := find_loss(output)) is not None]
            if len(losses) < len(outputs) or len(losses) == 1:
                return merged
            return with_loss(merged, merging.merged(LOSS, losses))

    # --------------------------------------------------------------- pieces

    def _cut(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = True
    ) -> tuple[CutCall, Merging] | None:
        """Cut a call, and find out how its results merge; None when it runs once, on the whole batch."""
        if self._spread.runs_whole:
            return None
        batch = self._pieces(args, kwargs, training=training)
        question = Question(
            kind=(
                code_of(self._function),
                training,
                self._model.training,
                torch.is_grad_enabled(),
                kind_of((args, kwargs)),
            ),
            view=view_of(given(args, kwargs), [given(*call) for call in batch.calls], batch.sizes, self._weight),
            whole=functools.partial(self._results, self._function, (args, kwargs)),
            pieces=[functools.partial(self._results, self._function, call) for call in batch.calls],
            detail=(detail_of((args, kwargs)), form_of(batch.sizes)),
            uncut=batch.uncut,
        )

        def asked() -> Merging | None:
            merging, name = Merging(self._asking, question, self._weight), f"a call of {type(self._model).__name__}"
            return None if merging.goes_whole(self._spread.settings.microbatches, name) else merging

        with nullcontext() if self.open_step.is_free else buffers_as_saved(self._model):
            merging = with_outputs(self._spread, asked)
        return None if merging is None else (batch, merging)

    @staticmethod
    def _results(function: Callable[..., Any], call: Call) -> Results:
        """Run a call that is only asked how its results merge."""
        args, kwargs = call
        output = without_caches(function(*args, **kwargs))
        check_available(output)
        loss = find_loss(output)
        return {_OUTPUT: output} if loss is None else {LOSS: loss, _OUTPUT: _without_loss(output)}

    def _pieces(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> CutCall:
        if any(is_cache(value) for value in (*args, *kwargs.values())) or (not training and asks_for_cache(kwargs)):
            return CutCall([(args, kwargs)], [1])  # generation: one call after another fills the caches
        may_stay = not training or self._spread.settings.microbatches != "batch"
        count = len(self._spread.pipeline.microbatches)
        cut = self._cutter.cut({**dict(enumerate(args)), **kwargs}, count, may_stay=may_stay)
        calls = [
            (tuple(each[i] for i in range(len(args))), {name: each[name] for name in kwargs}) for each in cut.pieces
        ]
        return CutCall(calls, cut.sizes, cut.refusal if training else "")

    def _seed(self) -> int:
        return block_seed(torch.initial_seed(), self.num_calls)


def _check_scaling(device: torch.device) -> None:
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16:
        raise SkipPipeError(
            "a loss that is computed for each microbatch in float16 goes back before a GradScaler can scale it; let "
            "the pipeline know that (TorchPipeline(..., scaler=scaler), or Accelerator(mixed_precision='fp16')), use "
            "torch.bfloat16, or compute the loss in the loop, from the outputs of the model (called without labels)"
        )


def _nothing() -> None:
    """Nothing to rewind."""


def _without_loss(output: Any) -> Any:
    """Return an output with nothing in the place of its loss."""
    return output if find_loss(output) is None else with_loss(output, None)
