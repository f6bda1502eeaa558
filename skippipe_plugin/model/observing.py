"""One look at a step on made-up hidden states: what its batch and its microbatches give, and what they leave."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..engine.device_errors import is_of_device
from ..engine.errors import SkipPipeError
from .answers import GRADIENTS, Answer, Clock
from .blocks_apart import difference_of_blocks, difference_of_lacking
from .counting import View, tensors
from .entering import HIDDEN
from .fakes import Fakes, Neutral
from .flips import flips
from .interleaving import DRAWN
from .kinks import COURSE, bent, features
from .kinks import WHY as BENDS
from .slopes import Slopes
from .spread import SpreadModel
from .traceless import Untouched
from .trials import LOSS, Left, Question, Results, Trials, named

_ROUNDING: Final = 2e-5
_DOUBLE_ROUNDING: Final = 1e-10
_WEIGHS: Final = "it is a mean over the weights of the samples' classes, which may differ from batch to batch"


class PieceFailed(Exception):
    """A microbatch fails where the batch does not."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A run of a step, for the batch or for a microbatch."""

    results: Results
    mode: Neutral
    """What has noted what ran."""
    slopes: Slopes | None
    """The gradient of its loss."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a step gave on one draw of hidden states."""

    whole: Ran
    parts: tuple[Ran, ...]
    dims: tuple[int, ...]
    """By call of the blocks: the dimension of the samples in what was answered."""


class Observing:
    """Looks at the steps of one model.

    Args:
        spread: The model's blocks.
        trials: Runs them.
        clock: Gets what they read beside it that moves with every batch.
    """

    def __init__(self, spread: SpreadModel, trials: Trials, clock: Clock) -> None:
        self._spread = spread
        self._trials = trials
        self._clock = clock

    def observe(self, question: Question, draw: int, trace: Untouched, answer: Answer) -> Observed | Exception:
        """Return what the batch and its microbatches give; or the error.

        Args:
            question: The step.
            draw: The draw of hidden states.
            trace: What the step finds.
            answer: Gets what is to be seen in no single result.
        """
        view, fakes = question.view, Fakes(question.view.sizes, draw, axes=answer.axes)
        view.rounding, marked = _ROUNDING, features_of(view)
        parts = self._run_pieces(question, fakes, marked, trace, answer)
        answer.hooks |= fakes.are_watched
        if isinstance(parts, Exception):
            return self._with_batch_alone(question, draw, trace, parts)
        drawn, by_turns = [part.mode.drawn for part in parts], {}
        if draw < 2 and not answer.crossing:
            results = [part.results for part in parts]
            answer.crossing = self._trials.crossing(question, draw, results, drawn, trace.restore)
            by_turns = trace.changes()
        whole = self._run(
            question.whole, fakes.of_whole, Neutral(drawn, features=marked), fakes.made[-1], trace.restore
        )
        if isinstance(whole, Exception):
            return whole
        answer.axes = fakes.axes()
        _note_runs(answer, whole.mode, parts, view, is_first=not draw)
        answer.left = answer.left or trace.changed_in_batch()  # then microbatches cannot take its place
        changes = trace.changes()
        self._note_entrances(answer, fakes, view)
        answer.metrics |= self._trials.metrics_that_differ(question, draw, trace.restore)
        if fakes.dtypes == {torch.float64}:
            view.rounding = _DOUBLE_ROUNDING
        if answer.blocks is None:
            answer.blocks = difference_of_blocks(self._spread, fakes, view.sizes)
        if (changes or by_turns) and not answer.left:
            answer.left = self._trials.left_behind(question, draw, drawn, Left(changes, by_turns), trace)
        return Observed(whole, tuple(parts), tuple(fakes.dims))

    def _run_pieces(
        self, question: Question, fakes: Fakes, marked: set[int], trace: Untouched, answer: Answer
    ) -> list[Ran] | Exception:
        """Run the step for each microbatch; return the error of the first that fails."""
        parts: list[Ran] = []
        sizes = question.view.sizes
        for index, piece in enumerate(question.pieces):
            reply, made = functools.partial(fakes.of_piece, index), fakes.made[index]
            ran = self._run(piece, reply, Neutral(features=marked), made, trace.restore, sizes[index] / sum(sizes))
            if isinstance(ran, Exception):
                return ran
            parts.append(ran)
            if ran.mode.reads_gradients:
                self._clock.reads.add(GRADIENTS)
            answer.constants |= ran.mode.constants
            answer.sizes |= ran.mode.sizes
            answer.crossing = answer.crossing or (DRAWN if trace.has_drawn() else "")
        return parts

    def _run(
        self,
        function: Callable[[], Results],
        reply: Callable[[Any], Tensor],
        mode: Neutral,
        made: Sequence[Tensor],
        restore: Callable[[], None],
        share: float = 1.0,
    ) -> Ran | Exception:
        """Run a step, and its loss's backward, or return the error."""
        try:
            results = self._trials.run(function, reply, mode, restore)
            return Ran(results, mode, self._trials.slopes(results, made, share))
        except SkipPipeError:
            raise
        except Exception as error:
            if is_of_device(error):
                raise
            return error

    def _with_batch_alone(self, question: Question, draw: int, trace: Untouched, failed: Exception) -> Exception:
        """Return why a microbatch failed: the batch does, too, or it does not."""
        alone = Fakes([sum(question.view.sizes)], draw)
        reply, made = functools.partial(alone.of_piece, 0), alone.made[0]
        whole = self._run(question.whole, reply, Neutral(), made, trace.restore)
        if isinstance(whole, Exception):
            return whole
        return PieceFailed(f"a microbatch fails where the batch does not: {type(failed).__name__}: {failed}")

    def _note_entrances(self, answer: Answer, fakes: Fakes, view: View) -> None:
        """Note what comes with the hidden states otherwise for microbatches than for the batch."""
        blocks = self._spread.pipeline.proxies.blocks
        for entrance in fakes.entrances(view.rounding):
            answer.failure = answer.failure or entrance.differs(blocks)
            answer.failure = answer.failure or difference_of_lacking(self._spread, entrance)
            if not entrance.is_of_samples:
                answer.odd[HIDDEN] = "it is computed over samples"


def features_of(view: View) -> set[int]:
    """Return the ids of the tensors in a batch and its microbatches whose values are features."""
    paths = {path for path, leaf in view.leaves.items() if next(features([leaf]), None) is not None}
    every = [each for part in (view.batch, *view.pieces) for each in tensors(part, "batch")]
    return {id(leaf) for path, leaf in every if path in paths}


def _note_runs(answer: Answer, whole: Neutral, parts: Sequence[Ran], view: View, *, is_first: bool) -> None:
    """Note what ran for the batch: what it compares with, and by what it may go another way."""
    if whole.weighs_classes:
        answer.odd[named(LOSS)] = _WEIGHS
    if bend := bent(whole.kinks, [part.mode.kinks for part in parts]):
        answer.odd[COURSE] = BENDS.format(name=bend)
    if is_first:
        answer.flips = flips(whole.compared, [part.mode.compared for part in parts], view)
    answer.constants |= whole.constants
    answer.takes_course = answer.takes_course or whole.takes_course
    answer.sizes |= whole.sizes
