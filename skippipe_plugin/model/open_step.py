"""Training steps of the blocks that are open: their forwards are done, and their backward comes with the user's own.

What the blocks have returned starts a graph of its own. When a backward of the user's has reached it, the step goes on
with the gradients; what has entered the blocks gets its gradient last, and that goes further back. The workers wait in
one step at a time: others, if they may be repeated, run once more when their gradients are there.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..driver.backward import GradientControl
from ..driver.capture.graphs import check_parts, comes_from, follow_leaf, goes_past
from ..driver.capture.suspend import StepThread, new_step_thread
from ..driver.unfinished import Parked
from ..engine.errors import SkipPipeError
from .entrance import Entrance, LoopGraph
from .outputs import differentiable, gated, is_real, map_tensors, watched
from .spread import SpreadModel
from .suspended import SuspendedStep, Train

_LOOKS: Final = 5
"""In how many backwards that is done where no hook is on the way: it takes as long as the graphs are large."""
_GONE: Final = (
    "this loss belongs to an earlier call of the model, whose gradients are gone: a pipeline takes one backward for "
    "each training call of the model, and before the next one, unless the first batch makes several calls already. Let "
    "every batch make them (with a weight of 0 where one should not count), compute the loss in the loop, from what "
    "the model returns without labels, put the inputs into one batch, or add the losses before backward"
)
_ONE_BACKWARD: Final = (
    "this loss belongs to a call of the blocks whose gradients are added already: a pipeline goes back through each "
    "call once. Add the losses before backward, or call the model once for each of them"
)
_GIVEN_UP: Final = (
    "the workers have given up the call of the model that this loss belongs to: they were needed before its backward, "
    "for {why}. Do that before the model is called, or after loss.backward()"
)
_LEFT: Final = (
    "the loss uses a tensor that the model has left beside what it returned (in an attribute, in a list, by a hook), "
)
_LEFT_BEFORE: Final = (
    f"{_LEFT}in a call that has to run once more, since another one came before the backward: the gradient of what it "
    "left the first time would be lost. Let the model return it, or make one call with both inputs"
)
_LEFT_OF_PARTS: Final = (
    f"{_LEFT}of which each microbatch has left its own. Let the model return it, or use microbatches='stack', with "
    "which it runs once, on the whole batch"
)
_INSIDE: Final = (
    "the gradient of a tensor that the model has returned is looked at (register_hook, retain_grad, torch.autograd."
    "grad), but a part of it comes of what the model itself has computed of that tensor, such as its loss, and stays "
    "inside of the call. Do it in the model's forward, compute in the loop what follows from the tensor (the loss from "
    "outputs without labels), or, if only the loop's part is meant, look at a copy of it (tensor.clone())"
)


class _Graph:
    """Lives as long as a graph that a call has started."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Call:
    """A training call whose backward is still to come; it lives as long as the graph that it started."""

    entrance: Entrance
    graph: weakref.ref[_Graph]
    """The graph that it started, as long as somebody has that."""
    again: Train | None = None
    """Runs it once more; None where it may not be repeated."""
    suspended: SuspendedStep | None = None
    """Its step, while the workers wait in it."""
    gradients: list[Tensor | None] | None = None
    is_over: bool = False
    given_up: str = ""
    """What for, if so."""
    of_all: bool = False
    """Whether gradients come of all outputs that may carry one, since it was not known which would."""
    spare: Train | None = None
    """Runs it once more, should others follow before it goes back."""
    late: Callable[[Parked], Train] | None = None
    """Makes that of a step that waits, where it was not foreseen."""
    is_anew: bool = False
    """Whether ``again`` runs the user's code anew, whose graph from before counts no more."""
    given: Sequence[weakref.ref[Tensor]] = ()
    """What it has returned that may carry a gradient, in a fixed order."""
    inside: frozenset[int] = frozenset()
    """Which of these have gone into others, or into its loss; as long as its step waits, that knows."""

    def check_looks(self, outputs: Sequence[Tensor], inputs: Sequence[Any]) -> None:
        """Refuse to look at gradients of what it has returned that are not all in the loop.

        Args:
            outputs: Where a backward begins.
            inputs: What single gradients are asked for.
        """
        looked_at = {index for index, ref in enumerate(self.given) if _is_looked_at(ref(), inputs)}
        if looked_at and looked_at & self._inside() and comes_from(outputs, functools.partial(_belongs_to, [self])):
            raise SkipPipeError(_INSIDE)

    def leave_step(self) -> SuspendedStep | None:
        """Wait in its step no more, and return that."""
        self.inside = self._inside()
        suspended, self.suspended = self.suspended, None
        return suspended

    def _inside(self) -> frozenset[int]:
        return self.inside if self.suspended is None else self.suspended.inside(len(self.given))

    def add(self, gradients: list[Tensor | None]) -> None:
        """Note gradients of its outputs, which may come in parts."""
        before = self.gradients or [None] * len(gradients)
        pairs = zip(before, gradients, strict=True)
        self.gradients = [new if old is None else old if new is None else old + new for old, new in pairs]

    def end(self, given_up: str = "") -> None:
        """Take no gradients any more."""
        self.is_over, self.given_up, self.again, self.spare = True, given_up, None, None
        self.late = None


class OpenStep:
    """Holds the training calls of a model, and does what their backwards ask for.

    Args:
        spread: The blocks.
        model: What they are of.
        device: The driver's device.
    """

    def __init__(self, spread: SpreadModel, model: nn.Module, device: torch.device) -> None:
        self._spread = spread
        self._device = device
        self._last: _Call | None = None
        """The only one in whose step the workers may wait."""
        self._earlier: list[weakref.ref[_Call]] = []
        self._thread: StepThread | None = None
        self._graph = LoopGraph(model)
        self._num_looked = 0
        """In how many backwards it was looked whether what enters one call is part of what enters another."""

    # ------------------------------------------------------------- forwards

    @property
    def is_free(self) -> bool:
        """Whether nobody has what a call has returned that is to go back still."""
        return all(call.graph() is None for call in self._open_calls())

    def repeat_last(self) -> Callable[[], bool] | None:
        """Let the last call, if somebody has what it returned and it may be repeated, wait for its gradients as such.

        Returns:
            What tells, when that batch is over, whether they have come; None where it is not so.
        """
        last = self._last
        if last is None or last.is_over or last.graph() is None:
            return None
        parked = None if last.suspended is None or last.late is None else last.suspended.parked()
        if parked is not None and last.late is not None:
            last.again = last.late(parked)
        elif last.spare is not None:
            last.again, last.is_anew = last.spare, True
        else:
            return None
        last.spare = None
        return lambda: last.is_over and not last.given_up

    def begin(self, why: str = "") -> bool:
        """Let another training call begin; return whether the workers had waited in one that is repeated for that.

        Args:
            why: What is said where one that may not be repeated would go back after this one.
        """
        waited = self.make_room(why)
        if self._last is not None and self._last.again is not None:
            self._earlier = [ref for ref in self._earlier if ref() is not None] + [weakref.ref(self._last)]
        self._last = None
        return waited

    def make_room(self, why: str) -> bool:
        """Let the workers wait in no step: what comes needs them, and ``why`` says what that is.

        Returns:
            Whether they had waited in one that is repeated when its gradients are there.
        """
        self.complete()
        return self._make_room(why)

    def _make_room(self, why: str) -> bool:
        last = self._last
        if last is None or last.suspended is None:
            return False
        suspended = last.leave_step()
        assert suspended is not None
        if last.again is None:
            last.end(why)
        self._abandon(suspended)
        self._spread.pipeline.heal()  # nobody may take what comes next for a part of the step
        return last.again is not None

    def hand_out(
        self,
        entrance: Entrance,
        train: Train,
        merge: Callable[[list[Any]], Any],
        *,
        what: str,
        draws_on: bool = False,
        repeats: bool = False,
        spare: Train | None = None,
        late: Callable[[Parked], Train] | None = None,
    ) -> Any:
        """Start a step that waits for the gradients of its outputs, and return these.

        Args:
            entrance: What has entered it.
            train: Runs it.
            merge: Makes one output of those of the microbatches.
            what: Names it, for errors.
            draws_on: Whether the step's code draws from the random state of the code around it.
            repeats: Whether it may be repeated.
            spare: Runs it once more, should others follow.
            late: Makes that of what is left of the step then, where there is none.
        """
        self._thread = self._thread or new_step_thread()
        suspended = SuspendedStep(self._thread, self._device, draws_on=draws_on)
        outputs = suspended.start(train)
        self._gradients.window.pause()
        graph = _Graph()
        call = self._last = _Call(
            entrance, weakref.ref(graph), train if repeats else None, suspended, spare=spare, late=late
        )
        carrying = suspended.carrying
        if not carrying:
            self._give_up("nothing")
            raise SkipPipeError(
                f"{what} was called for training, but nothing it returned carries a gradient; "
                "return a loss or differentiable outputs, or call it under torch.no_grad() or after model.eval()"
            )
        for result in suspended.ends.results:
            follow_leaf(result, functools.partial(self._receive_past, weakref.ref(call), len(carrying)))
        gates = iter(gated(carrying, functools.partial(self._receive, call, graph)))
        opened = [map_tensors(lambda t: next(gates) if t.requires_grad else t, output) for output in outputs]
        merged = merge(opened)
        call.given = [weakref.ref(tensor) for tensor in differentiable(merged)]
        return merged

    def hand_out_later(self, entrance: Entrance, train: Train, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return what a call has given already, whose step runs when its gradients are there."""
        graph = _Graph()
        call = self._last = _Call(entrance, weakref.ref(graph), train, of_all=True)
        real = [output for output in outputs if is_real(output)]
        gates = iter(gated(real, functools.partial(self._receive, call, graph)))
        return [next(gates) if is_real(output) else output for output in outputs]

    def take_over(self, entrance: Entrance, train: Train, leaf: Tensor) -> None:
        """Take over a call whose step was given up, and with whose result others have computed already.

        Args:
            entrance: What has entered it.
            train: Runs it once more.
            leaf: Gets the gradient of its result.
        """
        self.begin()
        graph = _Graph()
        call = self._last = _Call(entrance, weakref.ref(graph), train, of_all=True)
        follow_leaf(leaf, functools.partial(self._receive_leaf, call, graph))

    def watched(
        self,
        entrance: Entrance,
        loss: Tensor,
        beside: Any,  # Any: whatever the model returns
        spare: Train | None = None,
        num_parts: int = 1,
    ) -> Tensor:
        """Let a loss, whose step is over, have its place in the graph of the code around it.

        Args:
            entrance: What has entered the step.
            loss: Of the batch.
            beside: What the model has returned with it.
            spare: Runs the step once more, should others follow, and hands out its loss in parts that add up to it.
            num_parts: How many these are.
        """
        graph = _Graph()
        given = [weakref.ref(tensor) for tensor in differentiable(beside)]
        inside = frozenset(range(len(given)))  # which of them have gone into the loss nobody knows any more
        call = self._last = _Call(entrance, weakref.ref(graph), spare=spare, given=given, inside=inside)
        return watched(loss, functools.partial(self._claim, call, graph, num_parts), entrance.tensors, entrance.take())

    # ------------------------------------------------------------ backwards

    def begin_backward(self, outputs: Sequence[Tensor], inputs: Sequence[Any]) -> bool:
        """Prepare for a backward of the user's; return whether it must leave its graph.

        What it adds to gradients counts with what the step that waits will add.
        """
        calls = self._open_calls()
        for call in calls:
            call.check_looks(outputs, inputs)
        if inputs and comes_from(outputs, functools.partial(_belongs_to, calls)):
            self._graph.check_inputs(outputs, inputs, [each for call in calls for each in call.entrance.tensors])
        waiting = [call for call in calls if call.suspended is not None or call.again is not None]
        if not waiting:
            return False
        self._gradients.window.resume()
        entered = [each for call in waiting for each in call.entrance.tensors]
        steps = [call.suspended for call in waiting if call.suspended is not None]
        own = [each for step in steps for each in (*step.ends.sources, *step.carrying)]
        keeps = self._graph.keeps_graph(outputs, [*entered, *own])
        is_hooked = any(call.entrance.is_hooked for call in waiting)
        if keeps:
            check_parts(outputs, entered, is_hooked=is_hooked)
        if is_hooked or self._num_looked < _LOOKS:
            self._num_looked += 1
            for first, second in itertools.combinations([call.entrance.tensors for call in waiting], 2):
                if goes_past(first, *second):
                    check_parts(first, second, is_hooked=is_hooked)
        return keeps

    def complete(self, keep_graph: bool = False) -> None:
        """Run the backwards that the user's backward has asked for, and add their gradients."""
        calls = self._open_calls()
        reached = [call for call in calls if call.gradients is not None]
        if self._last is not None and self._last.suspended is not None and self._last.gradients is None:
            self._gradients.window.pause()
            if reached:
                self._make_room("the backward of an earlier one")
        with self._gradients.window.in_parts() if reached else nullcontext():
            for call in reversed(calls):  # the gradient of what entered one may go on through an earlier one
                if call.gradients is not None:
                    call.entrance.check()
                    self._finish(call)
                    call.entrance.go_back(keep_graph=keep_graph or call is not calls[0])

    def _finish(self, call: _Call) -> None:
        """Go back through one call, and add its gradients."""
        gradients, suspended, again = call.gradients, call.suspended, call.again
        assert gradients is not None
        call.suspended = None
        call.end()
        if suspended is not None:
            suspended.finish(gradients)
        else:
            assert again is not None, "a step that neither waits nor may be repeated"
            self._thread = self._thread or new_step_thread()
            step = SuspendedStep(self._thread, self._device, draws_on=True, of_all=call.of_all)
            step.repeat(again, gradients)
        self._gradients.merge(1.0)

    def settle(self, why: str) -> None:
        """Let no call wait any longer: what comes changes what they were computed with, and ``why`` says what it is."""
        self.make_room(why)
        for call in self._open_calls():
            call.spare = call.late = None
            if call.again is not None:
                call.end(why)

    def fail(self) -> None:
        """Drop what training calls have left to do: a backward that has reached one failed."""
        if any(call.gradients is not None for call in self._open_calls()) or (
            self._last is not None and self._last.is_over
        ):
            self._give_up("a backward that failed")
            self._last = None
        elif self._last is not None and self._last.suspended is not None:
            self._gradients.window.pause()

    def close(self) -> None:
        """Give up what is pending and end the thread."""
        self._give_up("the end of the pipeline")
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    # --------------------------------------------------------------- pieces

    @property
    def _gradients(self) -> GradientControl:
        return self._spread.pipeline.gradients

    def _open_calls(self) -> list[_Call]:
        """Return the calls whose backward is still to come, in their order."""
        calls = [*(ref() for ref in self._earlier), self._last]
        return [call for call in calls if call is not None and not call.is_over]

    def _receive(self, call: _Call, graph: _Graph, gradients: list[Tensor | None]) -> None:
        """A backward of the user's has reached the outputs."""
        self._check(call)
        call.add(gradients)

    def _receive_past(self, ref: weakref.ref[_Call], num_outputs: int, result: Tensor) -> None:
        """A backward of the user's has reached what the blocks have returned, past the outputs."""
        call = ref()
        if call is None or (call.is_over and not call.given_up):  # its own way back
            return
        self._check(call)
        if call.suspended is not None and len(call.suspended.ends.results) > 1:
            raise SkipPipeError(_LEFT_OF_PARTS)
        if call.is_anew:
            raise SkipPipeError(_LEFT_BEFORE)
        call.add([None] * num_outputs)

    def _receive_leaf(self, call: _Call, graph: _Graph, leaf: Tensor) -> None:
        """The same, where what they have computed with is a leaf."""
        gradient, leaf.grad = leaf.grad, None
        self._receive(call, graph, [gradient])

    def _claim(self, call: _Call, graph: _Graph, num_parts: int, gradient: Tensor) -> bool:
        """A backward of the user's has reached a loss whose step is over; return whether that runs once more."""
        self._check(call)
        if call.again is not None:
            call.add([gradient] * num_parts)
            return True
        call.end()
        return False

    def _check(self, call: _Call) -> None:
        if call.given_up:
            raise SkipPipeError(_GIVEN_UP.format(why=call.given_up))
        if call is not self._last and all(ref() is not call for ref in self._earlier):
            raise SkipPipeError(_GONE)
        if call.is_over:
            raise SkipPipeError(_ONE_BACKWARD)

    def _give_up(self, why: str) -> None:
        """Give up all calls, and note what for."""
        for call in self._open_calls():
            suspended, call.suspended = call.suspended, None
            call.end(why)
            if suspended is not None:
                self._abandon(suspended)
        self._earlier.clear()

    def _abandon(self, suspended: SuspendedStep) -> None:
        """Give a step up whose forwards are done, and count in the blocks."""
        with self._spread.pipeline.states.counted():
            suspended.abandon()


def _is_looked_at(tensor: Tensor | None, inputs: Sequence[Any]) -> bool:
    """Whether somebody wants the gradient of a tensor that may be gone."""
    if tensor is None:
        return False
    return bool(tensor._backward_hooks) or tensor.retains_grad or any(each is tensor for each in inputs)


def _belongs_to(calls: Sequence[_Call], node: Any) -> bool:  # Any: a node of autograd's graph
    """Whether a node of a graph is where one of the calls begins to go back."""
    asks = getattr(node, "on_backward", None)
    return isinstance(asks, functools.partial) and any(call in asks.args for call in calls)
