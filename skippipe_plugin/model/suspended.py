"""A training step that waits, its forwards done, for the gradients of the model's outputs.

The step runs in a thread of its own, which hands over like a coroutine: the loop's code and the step never run at
the same time. So a loss may be computed in the loop, from the outputs of the whole batch, as in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..driver.capture.graphs import Ends, check_parts, goes_past, of_others
from ..driver.capture.suspend import Returned, StepThread, Suspended, current_thread
from ..driver.capture.switches import Snapshot, switch_on
from ..driver.unfinished import Parked
from ..engine.call import Ambient, device_types
from ..engine.device import random_states, set_random_states
from ..engine.returned import tensors_in
from .outputs import differentiable, is_real

Train = Callable[[Callable[..., None]], None]
"""Runs a step whose loss is outside, given what back-propagates into the outputs of its microbatches."""


def _nothing() -> Parked | None:
    return None


class SuspendedStep:
    """One step, from its forwards to its gradients; a new one for each batch.

    Args:
        thread: Where it runs.
        device: The driver's device.
        draws_on: Whether the step's code draws from the loop's random state, as in one process, rather than its own.
        of_all: Whether gradients come of all outputs that may carry one, rather than of those that do.
    """

    def __init__(
        self, thread: StepThread, device: torch.device, *, draws_on: bool = False, of_all: bool = False
    ) -> None:
        self._thread = thread
        self._device = device
        self._draws_on = draws_on
        self._of_all = of_all
        self._gradients: Sequence[Tensor | None] | None = None
        self.ends = Ends()
        """Where the step's graph ends at the blocks."""
        self.carrying: Sequence[Tensor] = ()
        """The outputs' differentiable tensors, while it waits for their gradients."""
        self._num_microbatches = 0
        self.parked = _nothing
        """Tells what is left to do if the step is given up while it waits."""
        self._loop_states: list[Tensor] = []
        self._begun: Snapshot | None = None
        """What the loop had switched on around its call of the model, and may have left before its backward."""

    def start(self, train: Train) -> list[Any]:
        """Run all forwards; return the outputs by microbatch."""
        self._begun = Snapshot(stacks=False)
        self._loop_states = random_states(self._device)
        outcome = self._thread.start(lambda: train(self._back_propagate), Ambient.current(device_types(self._device)))
        assert isinstance(outcome, Suspended), "a step ended without asking for gradients"
        outputs: list[Any] = outcome.request
        self.carrying = [tensor for output in outputs for tensor in differentiable(output)]
        self._num_microbatches = len(outputs)
        return outputs

    def inside(self, num_outputs: int) -> frozenset[int]:
        """Return which of the batch's differentiable outputs others of them were computed of.

        Args:
            num_outputs: How many the batch has; if microbatches have others, nothing is known: it may be all.
        """
        if num_outputs * self._num_microbatches != len(self.carrying):
            return frozenset(range(num_outputs))
        return of_others(self.carrying[:num_outputs])

    def finish(self, gradients: Sequence[Tensor | None]) -> None:
        """Run all backwards, given the gradients of the outputs' differentiable tensors, by microbatch.

        None: the loop has not used it, so that it is as if the model did not return it.
        """
        self._loop_states = random_states(self._device)
        self._gradients = gradients
        assert self._begun is not None
        since = self._begun.take_back()
        try:
            outcome = self._thread.resume(gradients)
            assert isinstance(outcome, Returned)
        finally:
            switch_on(since)
            set_random_states(self._device, self._loop_states)

    def repeat(self, train: Train, gradients: Sequence[Tensor | None]) -> None:
        """Run a whole step, forwards and backwards, the gradients of whose outputs are known."""
        self._gradients = gradients
        self._loop_states = random_states(self._device)
        try:
            with torch.enable_grad():
                ambient = Ambient.current(device_types(self._device))
                outcome = self._thread.start(lambda: train(self._back_propagate), ambient)
            assert isinstance(outcome, Returned)
        finally:
            set_random_states(self._device, self._loop_states)

    def abandon(self) -> None:
        """Give the step up."""
        since = self._begun.take_back() if self._begun is not None else ()
        states = random_states(self._device)
        self._thread.abandon()
        set_random_states(self._device, states)
        switch_on(since)

    def _back_propagate(
        self,
        outputs: Sequence[Any],
        ends: Ends,
        parked: Callable[[], Parked | None] = _nothing,
    ) -> None:
        """In the step's thread: hand the outputs over, wait for their gradients, and go back from there.

        Args:
            outputs: By microbatch, or of the whole batch.
            ends: Where the step's graph ends at the blocks.
            parked: Tells what is left to do if the step is given up.
        """
        self.ends = ends
        if self._gradients is None:  # a step that a lost worker interrupted on its way back has them already
            self.parked = parked
            try:
                self._wait(outputs)
            finally:
                self.parked = _nothing  # it leads back to this step
        assert self._gradients is not None
        carrying = [tensor for output in outputs for tensor in differentiable(output)]
        if self._of_all:  # when they were handed out, nobody knew which of them would
            carrying = [tensor for output in outputs for tensor in tensors_in(output) if is_real(tensor)]
        pairs = zip(carrying, self._gradients, strict=True)
        used = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None and tensor.requires_grad]
        tensors = [tensor for tensor, _ in used]
        again = goes_past(tensors, *ends.sources)
        if again:
            check_parts(tensors, ends.sources, is_hooked=ends.is_hooked)
        if used:
            torch.autograd.backward(tensors, [gradient for _, gradient in used], retain_graph=again)

    def _wait(self, outputs: Sequence[Any]) -> None:
        thread = current_thread()
        assert thread is not None
        if self._draws_on:
            thread.suspend(list(outputs))
            return
        states = random_states(self._device)
        set_random_states(self._device, self._loop_states)
        thread.suspend(list(outputs))
        set_random_states(self._device, states)
