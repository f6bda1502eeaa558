"""Runs a step on made-up hidden states, for the batch and for its microbatches, and looks at what it leaves.

No worker computes anything. What a run finds and what it changed is brought back before the next.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..driver.capture.rewind import metric_states, set_metric_states
from ..driver.capture.suspend import Suspended, new_step_thread
from ..engine.call import Ambient, device_types
from ..engine.errors import SkipPipeError
from ..sharing import parameters_outside
from .counting import View
from .fakes import Fakes, Neutral
from .flips import Flip
from .interleaving import alike, by_turns, effect
from .reductions import same
from .slopes import Slopes, is_linear, slopes_of
from .spread import SpreadModel
from .traceless import Untouched

Key = tuple[Any, ...]
"""Names a result of a step: ``("loss",)``, ``("output",)``, ``("log", name, number)``."""
Results = dict[Key, Any]
LOSS: Final[Key] = ("loss",)


@dataclass(frozen=True, slots=True)
class Question:
    """One step to ask about."""

    kind: Hashable
    """Steps of the same kind reduce alike, as far as what follows does not matter."""
    view: View
    whole: Callable[[], Results]
    pieces: Sequence[Callable[[], Results]]
    detail: Hashable = ()
    """What a step may do otherwise for, if it has few values: numbers and texts in the batch, forms of microbatches."""
    uncut: str = ""
    """Why the batch is the only piece, where it cannot be cut."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a step has left, by name."""

    of_batch: Mapping[str, Any]
    by_turns: Mapping[str, Any]
    """When its microbatches took turns: what each brings back, another may have found changed."""

    def differently(self, in_parts: Mapping[str, Any], tolerance: float) -> set[str]:
        """Name what microbatches leave otherwise, one after the other or by turns; of the latter no backward ran."""
        found = _others(self.of_batch, in_parts, tolerance)
        return found | (_others(self.of_batch, self.by_turns, tolerance) & self.by_turns.keys())


def named(key: Key) -> str:
    """Return how users call a result."""
    return {"loss": "the loss", "output": "the output"}.get(key[0]) or f"self.log({key[1]!r})"


class Trials:
    """The runs of one model's steps.

    Args:
        spread: The model's blocks.
        module: What the steps belong to and may change.
        device: The driver's.
    """

    def __init__(self, spread: SpreadModel, module: nn.Module, device: torch.device) -> None:
        self._spread = spread
        self._module = module
        self._device = device
        self.most_calls = 0
        """How often a training step has called the blocks, at most."""

    def both(
        self, question: Question, fakes: Fakes, restore: Callable[[], None], flip: Flip | None = None
    ) -> tuple[Results, list[Results]] | None:
        """Return what the batch and its microbatches give; None where they fail, at an assertion for instance.

        Args:
            question: The step.
            fakes: What the blocks answer.
            restore: Brings everything back.
            flip: The comparison that comes out the other way for the first sample, or for its microbatch alone.
        """
        self._spread.pipeline.heal()
        modes = [Neutral(flip=None if index else flip) for index in range(len(question.pieces))]
        try:
            parts = [
                self.run(piece, functools.partial(fakes.of_piece, index), modes[index], restore)
                for index, piece in enumerate(question.pieces)
            ]
            of_batch = None if flip is None or flip.dim is None else flip
            mode = Neutral([each.drawn for each in modes], flip=of_batch)
            return self.run(question.whole, fakes.of_whole, mode, restore), parts
        except SkipPipeError:
            raise
        except Exception:
            return None

    def slopes(self, results: Results, made: Sequence[Tensor], factor: float = 1.0) -> Slopes | None:
        """Return the gradient of a loss, in whose backward user code may run."""
        with Neutral():
            return slopes_of(results.get(LOSS), made, self._own, factor)

    def is_linear(self, results: Results, made: Sequence[Tensor], *, is_half: bool) -> bool:
        """Whether the backward of a loss around the blocks makes multiples of multiples."""
        with Neutral():
            return is_linear(results.get(LOSS), made, self._own, is_half=is_half)

    def have_backward_hooks(self) -> bool:
        """Whether a module around the blocks has a hook that sees gradients."""
        blocks = {id(part) for block in self._spread.pipeline.proxies.blocks for part in block.modules()}
        around = (module for module in self._module.modules() if id(module) not in blocks)
        return any(module._backward_hooks or module._backward_pre_hooks for module in around)

    @property
    def _own(self) -> list[nn.Parameter]:
        """The parameters around the blocks."""
        return parameters_outside(self._module, self._spread.pipeline.proxies.blocks)

    def crossing(
        self,
        question: Question,
        draw: int,
        alone: Sequence[Results],
        drawn: Sequence[Sequence[Tensor]],
        restore: Callable[[], None],
    ) -> str:
        """Say how microbatches that take turns affect each other; nothing where they do not.

        Args:
            question: The step.
            draw: The draw of hidden states.
            alone: What each microbatch gave.
            drawn: By microbatch: what random functions gave it.
            restore: Brings everything back.
        """
        fakes = Fakes(question.view.sizes, draw)
        replies = [functools.partial(fakes.of_piece, index) for index in range(len(question.pieces))]
        modes = [Neutral([each]) for each in drawn]
        ambient = Ambient.current(device_types(self._device))
        restore()
        context = contextvars.copy_context()
        together = context.run(by_turns, question.pieces, replies, modes, ambient)
        return effect(alone, together, 1e-10 if fakes.dtypes == {torch.float64} else question.view.rounding)

    def metrics_that_differ(self, question: Question, draw: int, restore: Callable[[], None]) -> set[str]:
        """Name the torchmetrics that microbatches leave with other counts than the batch, whose run was the last."""
        whole = metric_states(self._module)
        if not whole:
            return set()
        fakes = Fakes(question.view.sizes, draw)
        for index, piece in enumerate(question.pieces):
            counted = metric_states(self._module) if index else None
            resume = functools.partial(_set_back, self._module, restore, counted)
            self.run(piece, functools.partial(fakes.of_piece, index), Neutral(), resume)
        counts = metric_states(self._module)
        return {name for name in whole if not _same_counts(whole[name][1], counts[name][1], question.view.rounding)}

    def left_behind(
        self,
        question: Question,
        draw: int,
        drawn: Sequence[Sequence[Tensor]],
        left: Left,
        trace: Untouched,
    ) -> str:
        """Name what is another when the step has run for each microbatch than when it has run for the batch.

        Args:
            question: The step.
            draw: The draw of hidden states.
            drawn: By microbatch: what random functions gave it.
            left: What the batch has left.
            trace: What the step finds.
        """
        fakes = Fakes(question.view.sizes, draw)
        for index, piece in enumerate(question.pieces):
            resume = _go_on if index else trace.restore
            part = self.run(piece, functools.partial(fakes.of_piece, index), Neutral([drawn[index]]), resume)
            self.slopes(part, fakes.made[index])
        found = left.differently(trace.changes(), question.view.rounding)
        if found:  # times and the like are others whenever a step runs
            self.slopes(self.run(question.whole, fakes.of_whole, Neutral(drawn), trace.restore), fakes.made[-1])
            found -= _others(left.of_batch, trace.changes(), question.view.rounding)
        return min(found, default="")

    def run(
        self,
        function: Callable[[], Results],
        reply: Callable[[Any], Tensor],
        mode: Neutral,
        restore: Callable[[], None],
    ) -> Results:
        restore()
        return contextvars.copy_context().run(self._run_in_own_context, function, reply, mode)

    def _run_in_own_context(
        self, function: Callable[[], Results], reply: Callable[[Any], Tensor], mode: Neutral
    ) -> Results:
        thread = new_step_thread()

        def under_mode() -> Results:
            with mode:
                return function()

        try:
            ambient, calls = Ambient.current(device_types(self._device)), 0
            outcome = thread.start(under_mode, ambient)
            while isinstance(outcome, Suspended):
                calls += ambient.grad
                self.most_calls = max(self.most_calls, calls)
                request = outcome.request
                with request.ambient.entered():
                    answer = reply(request)
                outcome = thread.resume(answer)
                request.recording.check()
            results: Results = outcome.value
            return results
        finally:
            thread.close()


def _set_back(module: nn.Module, restore: Callable[[], None], counted: Mapping[str, Any] | None) -> None:
    restore()
    if counted is not None:
        set_metric_states(module, counted)


def _go_on() -> None:
    """Bring nothing back."""


def _others(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> set[str]:
    """Return the names of what two runs have left differently."""
    names = one.keys() | other.keys()
    return {n for n in names if n not in one or n not in other or not alike(one[n], other[n], tolerance)}


def _same_counts(whole: Mapping[str, Any], parts: Mapping[str, Any], rounding: float) -> bool:
    """Compare a metric's states; lists are what was gathered so far, in pieces of any length."""
    for name, state in whole.items():
        one, other = state, parts[name]
        if isinstance(one, list) and one and other and all(isinstance(x, Tensor) and x.ndim for x in (*one, *other)):
            one, other = torch.cat(one), torch.cat(other)
        scale = float(one.abs().max()) if isinstance(one, Tensor) and one.is_floating_point() and one.numel() else 0.0
        if not same(one, other, rounding, scale):
            return False
    return True
