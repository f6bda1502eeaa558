"""Asks a step how its results reduce over samples: it runs on the driver alone, with made-up hidden states.

Before the first step of a kind, and when a batch holds something new, the user's functions run for the whole batch and
for each microbatch, and answer what rules their results follow (:mod:`.reductions`). No worker computes anything, and
nothing the functions change stays (:mod:`.traceless`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..driver.capture.contents import undo_changes
from ..engine.errors import SkipPipeError
from .answers import GRADIENTS, Answer, Clock
from .batch_state import BatchState
from .batch_statistics import BatchStatistics
from .blocks_apart import bend_of_blocks
from .counting import Counted, Given, Samples, View, Weighting, candidates
from .fakes import Fakes, Incomparable, Neutral
from .flips import WHY as TURNS
from .kinks import COURSE
from .observing import Observed, Observing, PieceFailed, features_of
from .reductions import COARSE, MISSING, as_loss, counts_samples, find_plan, mean_weightings, problems, same, without
from .resized import APART, FACTORS, ROUNDING, WHY_APART, resize
from .resized import WHY as SIZES
from .slopes import GRADIENT, follows, refuted_by
from .slopes import WHY as DETACHED
from .spread import SpreadModel
from .surroundings import Surroundings
from .traceless import Untouched, uneven, untouched
from .traces import SideAxes
from .trials import LOSS, Question, Results, Trials, named

_LEAST_ASKED: Final = 3
"""So many batches with labels or masks are asked about in any case: rules that are none may fit one by chance."""
_MOST_DETAILS: Final = 32
"""After so many details of a kind further ones are taken to say nothing, as numbers of samples and names of files."""
_MOST_SHOWN: Final = 8
"""A hand of the clock that has shown more than so many, most of them once, is taken to move with every batch."""
_MOST_ASKED: Final = 32
"""After so many batches of a kind nothing new is asked about, nor are masks looked for where there were none."""
_CLIPS: Final = (
    "{what} does something else with a multiple of a gradient than with the gradient (a hook or a function that clips "
    "it, for instance)"
)
_SHOWS: Final = "a tensor that keeps its gradient (retain_grad()), or a hook that looks at one, has it without that"


class Asking:
    """Knows how the steps of one model reduce; asks about those that are new.

    Args:
        spread: The model's blocks.
        module: What the steps belong to and may change.
        device: The driver's.
        weighted: Whether the user's own function says what microbatches weigh.
        quiet: Frames steps that are only asked, so that they reach nobody else.
        clock: What they read that tells where training is.
        ignored: Names of the module's attributes that are a framework's own.
        others: Names what else the steps can reach and change.
    """

    def __init__(
        self,
        spread: SpreadModel,
        module: nn.Module,
        device: torch.device,
        *,
        weighted: bool = False,
        quiet: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Clock | None = None,
        ignored: Collection[str] = (),
        others: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._spread = spread
        self._module = module
        self._device = device
        self._trials = Trials(spread, module, device)
        self._weighted = weighted
        self._quiet = quiet
        self.clock = clock or Clock()
        self._observing = Observing(spread, self._trials, self.clock)
        self._ignored = ignored
        self._others = others
        self._told: set[Hashable] = set()
        self._answers: dict[Hashable, Answer] = {}
        self._last: dict[Hashable, Answer] = {}
        """By kind: what was known last."""
        self._details: dict[Hashable, set[Hashable]] = {}
        self._reads: dict[Hashable, frozenset[str]] = {}
        self._shown: dict[tuple[Hashable, str], Counter[Hashable]] = {}
        """By kind and hand of the clock: how often it showed what."""
        self._fast = {*self.clock.fast, GRADIENTS}
        self._bends: dict[Hashable, str] = {}
        self._around: Surroundings | None = None
        self._statistics: BatchStatistics | None = None
        self._parts_of_blocks: list[nn.Module] = []

    def about(self, question: Question) -> Answer:
        """Return what is known about a step, asking first where that is not enough."""
        self._look_at_clock(question.kind)
        key = self._key(question)
        answer = self._answers.get(key)
        if answer is None:
            last = self._last.get(question.kind)
            if last is not None and last.has_no_rule:
                self._answers[key] = last
                return last
            return self._ask(question, _beginning(last))
        if answer.is_hopeless or answer.num_asked >= _MOST_ASKED:
            return answer
        view = question.view
        if (
            not answer.tells
            or self._is_open(answer, view)
            or answer.watch.is_new(view)
            or answer.outstanding.is_new(view)
        ):
            return self._ask(question, answer)
        return answer

    def _is_open(self, answer: Answer, view: View) -> bool:
        """Whether a few batches more are asked about: this one may be counted by labels or a mask."""
        if answer.num_asked >= _LEAST_ASKED or answer.num_plain >= _MOST_ASKED:
            return False
        counted = view.may_be_counted
        answer.num_plain += not counted
        return counted

    def _key(self, question: Question) -> Hashable:
        """Name what has to be alike for two steps to reduce alike, as far as that was seen."""
        details = self._details.setdefault(question.kind, set())
        detail = question.detail if question.detail in details or len(details) < _MOST_DETAILS else None
        details.add(detail)
        reads = self._reads.get(question.kind)
        read = self.clock.shows(reads - self._fast) if reads else ()
        return question.kind, detail, read, self.surroundings.number(), self._modes()

    def _look_at_clock(self, kind: Hashable) -> None:
        """Find out which of the hands of the clock that steps of a kind read move with every batch."""
        for name in self._reads.get(kind, frozenset()) - self._fast:
            shown = self._shown.setdefault((kind, name), Counter())
            shown[self.clock.shows((name,))] += 1
            if len(shown) > _MOST_SHOWN and 2 * len(shown) > shown.total():
                self._fast.add(name)

    def _modes(self) -> Hashable:
        """Return which parts of the blocks train: one that was frozen may look at other samples from then on."""
        if not self._parts_of_blocks:
            blocks = self._spread.pipeline.proxies.blocks
            self._parts_of_blocks = [part for block in blocks for part in block.modules()]
        return tuple([part.training for part in self._parts_of_blocks])

    def again(self, question: Question, answer: Answer) -> Answer:
        """Ask about a step of which something is known, but not enough."""
        return self._ask(question, answer) if answer.num_asked < _MOST_ASKED else answer

    def is_news(self, *what: Hashable) -> bool:
        """Whether this is to be said; not again."""
        is_news = what not in self._told
        self._told.add(what)
        return is_news

    def look(self, function: Callable[[], Results], batch: Any) -> Results | None:
        """Return what a step gives on made-up hidden states, whole; None where it fails on them.

        Args:
            function: The step.
            batch: What it gets, which is as before then.
        """
        undo = undo_changes(batch)
        try:
            return self._look(function)
        finally:
            undo()

    def _look(self, function: Callable[[], Results]) -> Results | None:
        with self._quiet(), self._untouched() as trace:

            def run() -> Results:
                self._spread.pipeline.heal()
                return self._trials.run(
                    function, functools.partial(Fakes([1], 0).of_piece, 0), Neutral(), trace.restore
                )

            try:
                return self._spread.pipeline.surviving(run)
            except SkipPipeError:
                raise
            except Exception:
                return None

    def bend(self, kind: Hashable, function: Callable[[], Results]) -> str:
        """Say what of a step's backward shows when a gradient is multiplied afterwards only; nothing if unknown.

        Args:
            kind: What steps have in common of which one is asked.
            function: Runs the step, whole.
        """
        if kind not in self._bends:
            self._bends[kind] = self._bend(function)
        return self._bends[kind]

    def _bend(self, function: Callable[[], Results]) -> str:
        fakes = Fakes([1], 0, axes=SideAxes(guesses=True))
        with torch.enable_grad(), self._quiet(), self._untouched() as trace:  # it is asked in a backward

            def run() -> str:
                reply = functools.partial(fakes.of_piece, 0)
                mode = Neutral()
                results = self._trials.run(function, reply, mode, trace.restore)
                if not self._trials.is_linear(results, fakes.made[0], is_half=mode.is_half):
                    return _CLIPS.format(what="the step, around the blocks,")
                return _SHOWS if mode.shows_gradients or self._trials.have_backward_hooks() else ""

            try:
                found = self._spread.pipeline.surviving(run)
            except SkipPipeError:
                raise
            except Exception:  # made-up hidden states may be its only reason
                found = ""
        bent = "" if found else bend_of_blocks(self._spread, fakes)
        return _CLIPS.format(what=bent) if bent else found

    @property
    def most_calls(self) -> int:
        """How often a training step that was tried has called the blocks, at most."""
        return self._trials.most_calls

    @property
    def is_watched(self) -> bool:
        """Whether forward hooks that run on the driver watch modules of the blocks."""
        return self._spread.pipeline.proxies.is_watched

    @property
    def surroundings(self) -> Surroundings:
        """What the driver's modules hold."""
        if self._around is None:
            self._around = Surroundings(self._module, self._spread.pipeline.proxies.blocks, self._ignored)
        return self._around

    @property
    def statistics(self) -> BatchStatistics:
        """What the blocks take from their batch."""
        if self._statistics is None:
            proxies = self._spread.pipeline.proxies
            self._statistics = BatchStatistics(proxies.names, proxies.blocks)
        return self._statistics

    # ---------------------------------------------------------------- asking

    def _untouched(self) -> AbstractContextManager[Untouched]:
        return untouched(self._module, self._device, self._others())

    def _ask(self, question: Question, answer: Answer) -> Answer:
        blocks = self._spread.pipeline.proxies.blocks
        self._spread.pipeline.around.look_again()
        self.clock.reads.clear()
        with (
            self._quiet(),
            uneven(self._module, blocks),
            self._untouched() as trace,
            _with_batch(trace, question.view) as trace,
        ):
            begins, suspect = not answer.tells, answer.sizes.suspect
            number = answer.num_asked  # each asks with hidden states of its own: what was 0 so far may be another
            draws = (0, 1) if begins else (4 * number + number % 2,)
            for draw in draws:
                learn = functools.partial(self._learn, question, answer, draw, trace)
                self._spread.pipeline.surviving(learn)
            if begins and not (answer.is_hopeless or answer.odd):
                self._spread.pipeline.surviving(functools.partial(self._turn, question, answer, trace))
            if answer.takes_course and begins and not (answer.is_hopeless or answer.odd):
                self._spread.pipeline.surviving(functools.partial(self._set_apart, question, answer, trace))
            if answer.sizes.suspect and (begins or not suspect) and not (answer.is_hopeless or answer.odd):
                self._spread.pipeline.surviving(functools.partial(self._resize, question, answer, trace))
        answer.hooks = answer.hooks and not self.is_watched  # those of before are looked at in each step
        answer.problems = dict(answer.odd)
        for name in sorted(answer.metrics):
            answer.problems[f"the metric {name}"] = "its counts are others when it is updated once for each of them"
        for key, plan in answer.plans.items():
            answer.problems |= problems(plan, named(key))
            answer.lacked |= {each for each in mean_weightings(plan) if question.view.weights(each) is None}
        answer.counts_samples = all(map(counts_samples, answer.plans.values()))
        answer.num_asked += 1
        answer.watch.learn(question.view, answer.constants)
        answer.outstanding.learn(question.view, answer.watch.landmarks)
        reads = self._reads.get(question.kind, frozenset()) | self.clock.reads
        self._reads[question.kind] = reads
        answer.read = min(reads & self._fast, default="")
        self._answers[self._key(question)] = self._last[question.kind] = answer
        return answer

    def _learn(self, question: Question, answer: Answer, draw: int, trace: Untouched) -> None:
        """Let the step run on one draw of hidden states; positive ones where others make no sense."""
        self._spread.pipeline.heal()
        seen = self._observing.observe(question, draw, trace, answer)
        odd = isinstance(seen, Exception) or not _is_finite(seen.whole.results.get(LOSS))
        if odd and not isinstance(seen, PieceFailed):  # what a block has refused it is not asked again
            other = self._observing.observe(question, draw + 2, trace, answer)
            seen = seen if isinstance(other, Exception) else other
        if isinstance(seen, Incomparable | PieceFailed):
            answer.failure = str(seen)
        elif isinstance(seen, Exception):  # made-up hidden states may be its only reason
            answer.failure = f"it failed when it was tried on made-up hidden states: {type(seen).__name__}: {seen}"
        else:
            answer.tells = answer.tells or _tells(seen.whole.results)
            self._narrow(question.view, answer, seen.whole.results, [part.results for part in seen.parts])
            self._check_slopes(answer, seen, question.view)

    def _turn(self, question: Question, answer: Answer, trace: Untouched) -> None:
        """Let what was compared come out otherwise for one sample, or for one microbatch."""
        for flip in answer.flips:
            found = self._trials.both(question, Fakes(question.view.sizes, 0), trace.restore, flip)
            if found is None:
                continue
            turned = dataclasses.replace(answer, plans={**answer.plans})
            self._narrow(question.view, turned, *found)
            if any(problems(plan, named(key)) for key, plan in turned.plans.items()):
                answer.odd[COURSE] = TURNS.format(name=flip.name)
                return
            answer.plans = turned.plans  # of rules that fitted a batch without any such sample, one may be left

    def _resize(self, question: Question, answer: Answer, trace: Untouched) -> None:
        """Let features and hidden states be of other sizes, for steps that may do something else then."""
        view = question.view
        for factor in FACTORS:
            if factor > 1 and answer.sizes.has_indices:
                continue
            change = functools.partial(resize, view, factor=factor)
            if not self._follows_still(question, answer, trace, change, Fakes(view.sizes, 0, factor), ROUNDING):
                answer.odd[COURSE] = SIZES.format(name=answer.sizes.suspect)
                return

    def _set_apart(self, question: Question, answer: Answer, trace: Untouched) -> None:
        """Let the values of one microbatch be unlike all others'."""
        view = question.view
        for apart in APART:
            if answer.sizes.has_indices and apart.is_of_sign:
                continue
            change = functools.partial(apart.write, view)
            fakes = Fakes(view.sizes, 0, first=apart.hidden)
            if not self._follows_still(question, answer, trace, change, fakes, view.rounding):
                answer.odd[COURSE] = WHY_APART
                return

    def _follows_still(
        self,
        question: Question,
        answer: Answer,
        trace: Untouched,
        change: Callable[[Collection[int]], object],
        fakes: Fakes,
        rounding: float,
    ) -> bool:
        """Whether what a step gives with other values, if anything, follows from microbatches by the rules known.

        Args:
            question: The step.
            answer: What is known about it.
            trace: Brings everything back.
            change: Writes the other values into the batch's features, given their ids; samples count by these.
            fakes: What the blocks answer.
            rounding: How far results may be off.
        """
        trace.restore()
        marked = features_of(question.view)

        def restore() -> None:
            trace.restore()
            change(marked)

        found = self._trials.both(question, fakes, restore)
        if found is None:
            return True
        restore()
        view, other = question.view.anew(rounding), dataclasses.replace(answer, plans={**answer.plans})
        self._narrow(view, other, *found)
        is_cut = all(entrance.is_of_samples for entrance in fakes.entrances(view.rounding))
        return is_cut and not any(problems(plan, named(key)) for key, plan in other.plans.items())

    def _narrow(self, view: View, answer: Answer, whole: Results, parts: Sequence[Results]) -> None:
        weightings = self._weightings(view, answer)
        keys = dict.fromkeys([*whole, *(key for part in parts for key in part)])
        for key in keys:
            pieces = [part.get(key, MISSING) for part in parts]
            plan = find_plan(whole.get(key, MISSING), pieces, view, weightings, answer.plans.get(key))
            answer.plans[key] = as_loss(plan) if key == LOSS else plan

    def _weightings(self, view: View, answer: Answer) -> list[Weighting]:
        """Return what means may be over; what says the same as samples in this batch cannot be told from them."""
        known = [each for plan in answer.plans.values() for each in mean_weightings(plan)]
        fresh: dict[tuple[Any, ...], Counted] = {}
        for each in candidates(view, answer.constants):
            if not view.is_plain(each) and (weights := view.weights(each)) is not None:
                fresh.setdefault((each.path, each.trim, each.rows, weights), each)
        first: list[Weighting] = [Given()] if self._weighted else []
        return list(dict.fromkeys([*first, Samples(), *known, *fresh.values()]))

    def _check_slopes(self, answer: Answer, seen: Observed, view: View) -> None:
        """Note where the gradient of the loss does not follow as the loss does."""
        whole, parts = seen.whole.slopes, [part.slopes for part in seen.parts if part.slopes is not None]
        if whole is None or len(parts) < len(seen.parts):
            return
        if not follows(whole, parts, seen.dims, answer.plans.get(LOSS), view, is_coarse=seen.whole.mode.is_coarse):
            answer.odd[GRADIENT] = DETACHED
        elif LOSS in answer.plans and _is_rough(seen.whole.results.get(LOSS)):
            wrong = refuted_by(whole, parts, seen.dims, answer.plans[LOSS], view)
            results = [seen.whole.results, *(part.results for part in seen.parts)]
            for key, plan in answer.plans.items():  # what is logged of a loss is reduced as the loss is
                if key == LOSS or all(same(each.get(key), each.get(LOSS)) for each in results):
                    answer.plans[key] = without(plan, wrong)


@contextmanager
def _with_batch(trace: Untouched, view: View) -> Iterator[Untouched]:
    """Bring the batch back, too."""
    batch = BatchState(view)

    def restore() -> None:
        trace.restore()
        batch.restore()

    try:
        yield dataclasses.replace(trace, restore=restore, changed_in_batch=batch.changed)
    finally:
        batch.restore()


def _beginning(last: Answer | None) -> Answer:
    """Begin with the rules of other steps of the kind: of several that fit, they are the likelier ones."""
    if last is None:
        return Answer()
    return Answer({} if last.is_hopeless else {**last.plans}, constants={*last.constants}, is_told=last.is_told)


def _is_rough(loss: Any) -> bool:
    return isinstance(loss, Tensor) and loss.dtype in COARSE


def _tells(results: Results) -> bool:
    """Whether a loss, or else any other result, says something: it may be nothing but 0 or NaN without labels."""
    values = [results[LOSS]] if LOSS in results else [each for each in results.values() if each is not None]
    return not values or any(map(_says, values))


def _says(value: Any) -> bool:
    if isinstance(value, Tensor):
        found = value.detach()
        return bool((torch.isfinite(found) & (found != 0)).any())
    return not isinstance(value, float) or (value != 0 and math.isfinite(value))


def _is_finite(loss: Any) -> bool:
    return not isinstance(loss, Tensor) or bool(torch.isfinite(loss.detach()).all())
