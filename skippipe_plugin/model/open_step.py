"""A training step of the blocks that is open: its forwards are done, and its backward comes with the user's own.

What the blocks have returned starts a graph of its own. When a backward of the user's has reached it, the step goes on
with the gradients; what has entered the blocks gets its gradient last, and that goes further back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..driver.backward import GradientControl
from ..driver.capture.graphs import comes_from
from ..driver.capture.suspend import StepThread, new_step_thread
from ..engine.errors import SkipPipeError
from .entrance import Entrance, LoopGraph
from .outputs import differentiable, gated, map_tensors, watched
from .spread import SpreadModel
from .suspended import SuspendedStep, Train

_ONE_BACKWARD: Final = (
    "this loss belongs to {which} call of the model, whose gradients are {state}: a pipeline takes one backward for "
    "each training call of the model, before the next one. Put both inputs into one batch, or add the losses before "
    "backward"
)
_GIVEN_UP: Final = (
    "the workers have given up the call of the model that this loss belongs to: they were needed before its backward, "
    "for {why}. Do that before the model is called, or after loss.backward()"
)


@dataclass(slots=True, eq=False)
class _Pending:
    """The training call whose backward is still to come."""

    entrance: Entrance
    suspended: SuspendedStep | None = None
    gradients: list[Tensor | None] | None = None
    is_over: bool = False
    given_up: str = ""
    """What for, if so."""


class OpenStep:
    """Holds the last training call of a model, and does what its backward asks for; there is one at a time.

    Args:
        spread: The blocks.
        model: What they are of.
        device: The driver's device.
    """

    def __init__(self, spread: SpreadModel, model: nn.Module, device: torch.device) -> None:
        self._spread = spread
        self._device = device
        self._pending: _Pending | None = None
        self._thread: StepThread | None = None
        self._graph = LoopGraph(model)

    # ------------------------------------------------------------- forwards

    def begin(self) -> None:
        """Let another training call begin: the one before is over."""
        self.settle("another call of the model")
        self._pending = None

    def hand_out(
        self,
        entrance: Entrance,
        train: Train,
        merge: Callable[[list[Any]], Any],
        *,
        what: str,
        draws_on: bool = False,
    ) -> Any:
        """Start a step that waits for the gradients of its outputs, and return these.

        Args:
            entrance: What has entered it.
            train: Runs it.
            merge: Makes one output of those of the microbatches.
            what: Names it, for errors.
            draws_on: Whether the step's code draws from the random state of the code around it.
        """
        self._thread = self._thread or new_step_thread()
        suspended = SuspendedStep(self._thread, self._device, draws_on=draws_on)
        outputs = suspended.start(train)
        self._gradients.window.pause()
        pending = self._pending = _Pending(entrance, suspended)
        carrying = [tensor for output in outputs for tensor in differentiable(output)]
        if not carrying:
            self._give_up("nothing")
            raise SkipPipeError(
                f"{what} was called for training, but nothing it returned carries a gradient; "
                "return a loss or differentiable outputs, or call it under torch.no_grad() or after model.eval()"
            )
        gates = iter(gated(carrying, functools.partial(self._receive, pending)))
        opened = [map_tensors(lambda t: next(gates) if t.requires_grad else t, output) for output in outputs]
        return merge(opened)

    def watched(self, entrance: Entrance, loss: Tensor) -> Tensor:
        """Let a loss, whose step is over, have its place in the graph of the code around it."""
        pending = self._pending = _Pending(entrance)
        return watched(loss, functools.partial(self._claim, pending), entrance.tensors, entrance.take())

    # ------------------------------------------------------------ backwards

    def begin_backward(self, outputs: Sequence[Tensor], inputs: Sequence[Any]) -> bool:
        """Prepare for a backward of the user's; return whether it must leave its graph.

        What it adds to gradients counts with what the step that waits will add.
        """
        pending = self._pending
        if pending is None or pending.is_over:
            return False
        if inputs and comes_from(outputs, functools.partial(_belongs_to, pending)):
            self._graph.check_inputs(outputs, inputs, pending.entrance.tensors)
        if pending.suspended is None:
            return False
        self._gradients.window.resume()
        return self._graph.keeps_graph(outputs, [*pending.entrance.tensors, *pending.suspended.sources])

    def complete(self, keep_graph: bool = False) -> None:
        """Run the backwards that the user's backward has asked for, and add their gradients."""
        pending = self._pending
        if pending is None or pending.suspended is None:
            return
        if pending.gradients is None:
            self._gradients.window.pause()
            return
        suspended, pending.suspended = pending.suspended, None
        suspended.finish(pending.gradients)
        self._gradients.merge(1.0)
        pending.entrance.go_back(keep_graph=keep_graph)

    def settle(self, why: str) -> None:
        """Let no step wait any longer: what comes needs the workers, and ``why`` says what that is."""
        self.complete()
        if self._give_up(why):
            self._spread.pipeline.heal()  # nobody may take what comes next for a part of the step

    def fail(self) -> None:
        """Drop what the last training call has left to do: a backward that has reached it failed."""
        if self._pending is not None and self._pending.is_over:
            self._give_up("a backward that failed")
            self._pending = None
        elif self._pending is not None and self._pending.suspended is not None:
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

    def _receive(self, pending: _Pending, gradients: list[Tensor | None]) -> None:
        """The user's backward has reached the outputs."""
        self._claim(pending)
        pending.gradients = gradients

    def _claim(self, pending: _Pending) -> None:
        if pending is not self._pending:
            raise SkipPipeError(_ONE_BACKWARD.format(which="an earlier", state="gone"))
        if pending.given_up:
            raise SkipPipeError(_GIVEN_UP.format(why=pending.given_up))
        if pending.is_over:
            raise SkipPipeError(_ONE_BACKWARD.format(which="a", state="added already"))
        pending.is_over = True

    def _give_up(self, why: str) -> bool:
        """Give up a step that waits, and note what for; return whether one did."""
        pending = self._pending
        if pending is None or pending.suspended is None:
            return False
        suspended, pending.suspended = pending.suspended, None
        pending.is_over, pending.given_up = True, why
        suspended.abandon()
        return True


def _belongs_to(pending: _Pending, node: Any) -> bool:  # Any: a node of autograd's graph
    """Whether a node of a graph is where a call of the model begins to go back."""
    asks = getattr(node, "on_backward", None)
    return isinstance(asks, functools.partial) and pending in asks.args
