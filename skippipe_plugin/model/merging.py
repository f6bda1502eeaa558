"""The results of one step, merged from those of its microbatches by what is known about the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..driver.capture.batches import BatchError
from ..engine.errors import SkipPipeError
from .answers import Answer
from .asking import Asking
from .counting import Given, Samples, Weighting
from .reductions import (
    Mean,
    Plan,
    Unsettled,
    check_settled,
    counts_nothing,
    mean_weightings,
    merge,
    weighting_of,
)
from .settings import CutWhere
from .trials import LOSS, Key, Question, named
from .weight import MicrobatchWeight

Agree = Callable[[Any], list[Any]]
"""Gives every driver what each of them has."""
_TRIES: Final = 6
"""How often a step is asked about again whose results leave something open."""
log = logging.getLogger(__name__)


def alone(value: Any) -> list[Any]:
    """Agree with no other driver."""
    return [value]


_NOT_CUT: Final = (
    "the step runs once for each of {count} microbatches, but {what} of the batch does not follow from theirs: {why}. "
    "{ways}"
)
_WAYS: Final = (
    "Run the step once, on the whole batch, with microbatches='stack', or say what a microbatch weighs with "
    "microbatch_weight=... (a function of the microbatch, 'samples' or 'sum')"
)
_WAY: Final = "Run the step once, on the whole batch, with microbatches='stack'"
"""Of what is no mean, so that no weight helps."""
_FAILS: Final = (
    "the step runs once for each of {count} microbatches, and {why}. Run the step once, on the whole batch, with "
    "microbatches='stack', or put what it needs of the whole batch (a padded length, for instance) into the batch"
)
_CROSS: Final = (
    "the step runs once for each of {count} microbatches, several of which wait for the blocks at a time, and {why}. "
    "Run the step once, on the whole batch, with microbatches='stack' or num_microbatches=1, or pass on in variables "
    "what the step needs behind the blocks"
)
_SEEN: Final = (
    "the step runs once for each of {count} microbatches, but forward hooks of yours watch modules of the blocks, and "
    "are to see the whole batch. Run the step once, on the whole batch, with microbatches='stack' or "
    "num_microbatches=1, or remove them"
)
_READS: Final = (
    "the step runs once for each of {count} microbatches, but it reads {name}, which is another with every batch, so "
    "that what it will do cannot be found out before. Run the step once, on the whole batch, with microbatches='stack' "
    "or num_microbatches=1, or do where microbatches are not known (on_train_batch_end, a loop of your own) what "
    "depends on it"
)
_BLOCKS: Final = (
    "the step runs once for each of {count} microbatches, and {why}. Run the step once, on the whole batch, with "
    "microbatches='stack' or num_microbatches=1"
)
_LEFT: Final = (
    "the step runs once for each of {count} microbatches, but {name} is then another than when it has run for the "
    "batch. Run the step once, on the whole batch, with microbatches='stack' or num_microbatches=1, or do where "
    "microbatches are not known (on_train_batch_end, a loop of your own) what is to happen once for a batch"
)
_WHOLE: Final = (
    "%s runs once, on the whole batch, of which only what enters the blocks is cut: every forward comes before the "
    "loss, and the head has the whole batch at once. The reason: %s"
)
_OF_EACH: Final = (
    ". There are {count} drivers, each with a batch of its own: what looks at all samples sees those of one driver, as "
    "under DistributedDataParallel. drivers=1 gives it all of them"
)


class Merging:
    """How the results of one step merge.

    Args:
        asking: Finds out.
        question: The step.
        weight: What a microbatch weighs, by the user.
    """

    def __init__(self, asking: Asking, question: Question, weight: MicrobatchWeight | None) -> None:
        self.asking = asking
        self.question = question
        self.weight = weight
        self.answer: Answer | None = asking.about(question) if len(question.pieces) > 1 else None
        self.obstacle = self._find_obstacle()
        """Why the batch cannot be cut, whatever becomes of the results; nothing where it can."""
        self._open: Mapping[str, str] = {}
        """By name of a result: why this batch's does not follow, though those of others may."""
        self._has_asked_again = False
        if self.answer is not None and weight is None and not self.obstacle and not self.problems:
            self._settle()

    def _find_obstacle(self) -> str:
        answer, count = self.answer, len(self.question.pieces)
        if answer is None:
            return self.question.uncut
        if alone := self.asking.statistics.alone(self.question.view.sizes):
            return _FAILS.format(count=count, why=alone)
        if self.asking.is_watched or answer.hooks:
            return _SEEN.format(count=count)
        if answer.read:
            return _READS.format(count=count, name=answer.read)
        if answer.failure:
            return _FAILS.format(count=count, why=answer.failure)
        if answer.crossing:
            return _CROSS.format(count=count, why=answer.crossing)
        if answer.blocks:
            return _BLOCKS.format(count=count, why=answer.blocks)
        return _LEFT.format(count=count, name=answer.left) if answer.left else ""

    @property
    def problems(self) -> Mapping[str, str]:
        """By name of a result: why it does not follow from the microbatches'; nothing where the user says what does."""
        return {**self.answer.problems, **self._open} if self.answer is not None and self.weight is None else {}

    @property
    def lacking(self) -> Mapping[str, str]:
        """By name of a result: of what the batch has nothing, which it is a mean over; other drivers' may have some."""
        if self.answer is None or self.weight is not None or self.answer.counts_samples:
            return {}
        found = {named(key): counts_nothing(plan, self.question.view) for key, plan in self.answer.plans.items()}
        return {name: why for name, why in found.items() if why}

    def refusal(self) -> SkipPipeError | None:
        """Return the error that says why the batch cannot be cut; None when it can."""
        if obstacle := self.obstacle:
            return BatchError(obstacle) if self.question.uncut else SkipPipeError(obstacle)
        return self._refused(self.problems)

    def _refused(self, problems: Mapping[str, str]) -> SkipPipeError | None:
        for what, why in problems.items():
            count = len(self.question.pieces)
            ways = _WAYS if what == named(LOSS) else _WAY
            return SkipPipeError(_NOT_CUT.format(count=count, what=what, why=why, ways=ways))
        return None

    def goes_whole(self, where: CutWhere, name: str, agree: Agree = alone) -> bool:
        """Whether the step must run once, on the whole batch; every driver calls this alike.

        Args:
            where: The user's setting.
            name: The step's.
            agree: Gives every driver what each of them has.

        Raises:
            SkipPipeError: It must, but the user wants the batch to be cut.
        """
        own = self.refusal()
        refusals, lacking = zip(*agree((own, None if own else self._refused(self.lacking))), strict=True)
        refusal = next(filter(None, refusals), None)
        if refusal is None and where != "batch" and all(lacking):
            refusal = lacking[0]
        if refusal is None:
            if self.answer is not None:
                self.asking.statistics.tell(self.question.view.sizes, len(refusals))
            return False
        if where == "batch":
            raise refusal
        if self._is_news():
            reason = str(refusal).partition(". Run the step once")[0]
            log.warning(_WHOLE, name, reason + (_OF_EACH.format(count=len(refusals)) if refusals[1:] else ""))
        return True

    def _is_news(self) -> bool:
        """Whether it was not said before that steps of this kind run once; it is now."""
        if self.answer is None:
            return self.asking.is_news("uncut", self.question.kind)
        is_news = not self.answer.is_told
        self.answer.is_told = True
        return is_news

    def _settle(self) -> None:
        """Ask about this very batch if it tells apart what others did not; what stays open is a problem of its own."""
        answer = self.answer
        assert answer is not None
        if answer.counts_samples or not self._unsettled(answer):
            return
        lacking = {each for plan in answer.plans.values() for each in self._lacking(plan)}
        if not lacking or lacking - answer.lacked:  # another batch without any of these says nothing more
            self.ask_again()
        assert self.answer is not None
        self._open = self._unsettled(self.answer)

    def _unsettled(self, answer: Answer) -> dict[str, str]:
        """Return, by name of a result, which rules that fit so far say something else of this batch."""
        found: dict[str, str] = {}
        for key, plan in answer.plans.items():
            try:
                check_settled(plan, self.question.view)
                if key == LOSS:
                    weighting_of(plan, self.question.view)
            except Unsettled as error:
                found[named(key)] = str(error)
        return found

    def _lacking(self, plan: Plan) -> list[Weighting]:
        """Return what means may be over, of which this batch has nothing."""
        return [each for each in mean_weightings(plan) if self.question.view.weights(each) is None]

    def ask_again(self) -> None:
        """Ask about this very batch, which shows what others did not."""
        if not self._has_asked_again and self.answer is not None:
            self._has_asked_again = True
            self.answer = self.asking.again(self.question, self.answer)
            self.obstacle = self._find_obstacle()

    def merged(self, key: Key, parts: Sequence[Any]) -> Any:
        """Return the batch's result.

        Raises:
            SkipPipeError: It does not follow from the parts by any rule.
        """
        if self.answer is None:
            return parts[0]
        for _ in range(_TRIES):
            try:
                return self._merge(key, parts)
            except (KeyError, Unsettled):  # counts of what is rare may have been 0 so far
                self.answer = self.asking.again(self.question, self.answer)
        try:
            return self._merge(key, parts)
        except (KeyError, Unsettled) as error:
            why = str(error) if isinstance(error, Unsettled) else "it did not come out when the step was tried"
            raise self.unclear(key, why) from None

    def unclear(self, key: Key, why: str) -> SkipPipeError:
        """Return the error that says why a result does not follow from the microbatches'."""
        count = len(self.question.pieces)
        ways = _WAYS if key == LOSS else _WAY
        return SkipPipeError(_NOT_CUT.format(count=count, what=named(key), why=why, ways=ways))

    def _merge(self, key: Key, parts: Sequence[Any]) -> Any:
        assert self.answer is not None
        otherwise = None
        if self.weight is not None:  # the user's word holds for whatever follows no rule
            otherwise = Mean(Given() if callable(self.weight) else Samples())
        return merge(self.answer.plans[key], parts, self.question.view, otherwise=otherwise)
