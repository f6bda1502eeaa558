"""Ask the user's code where a call of the block stack may be cut, and remember the answers.

The code runs once more up to the blocks, with a batch of another size, and is given up there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...engine.call import Ambient
from ...engine.device_errors import is_of_device
from ...engine.errors import SkipPipeError
from ...engine.transport import TensorSpec
from .cutting import NO_DIMENSION, CallForm, Cut, NotCuttable, are_numbers, find_cut
from .growing import holds_iterators, sample_counts, with_more_samples
from .stack_call import StackCall
from .suspend import StepThread, Suspended
from .switches import Snapshot

log = logging.getLogger(__name__)

_MOST_COUNTS: Final = 8
"""How many ways to count a batch's samples are looked at."""
_MOST_ASKED: Final = 3
"""Of how many of them the user's code is asked."""
_NOT_CUT: Final = (
    "the blocks get whole batches, so one stage works at a time: %s. What they make is what one process makes of "
    "this batch; docs/limits.md says how a batch can be cut"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """How the user's code is asked which dimensions are the batch's."""

    num_samples: int
    """The samples of the batch, if this is how they are counted."""
    num_others: int
    """The samples of another batch, with which ``function`` runs."""
    function: Callable[[], Any]  # Any: it never returns
    """The step on the other batch; it is given up where it calls the blocks."""
    has_packed: bool = False
    """Whether that batch has everything twice: what is packed without a dimension of the samples, too."""


def questions(step: Callable[[Any], Any], batch: Any) -> list[Question]:
    """Return what may be asked of ``step`` about ``batch``: with one sample more, with all of them twice, or with all
    else that has rows twice, too.

    Args:
        step: Runs the user's code on a batch.
        batch: The batch, which need not have the samples first in every tensor.
    """
    counts = sample_counts(batch)
    if not counts or counts[0] == 1 or holds_iterators(batch):
        return []
    return [
        Question(
            num_samples=count,
            num_others=count + more,
            function=functools.partial(_ask, step, batch, count, None if has_packed else more),
            has_packed=has_packed,
        )
        for count in counts[:_MOST_COUNTS]
        for more, has_packed in ((1, False), (count, False), (count, True))
        if count > 1 and (not has_packed or len(counts) > 1)
    ]


def _ask(step: Callable[[Any], Any], batch: Any, count: int, more: int | None) -> Any:
    return step(with_more_samples(batch, count, more))


class CutBook:
    """Remembers across steps how each kind of call is cut, and what it has said of those that are not."""

    def __init__(self) -> None:
        self.settled: set[str] = set()
        """The user's functions whose calls were all known in their last step: their state need not be noted."""
        self._known: dict[Hashable, list[tuple[int, Cut] | None]] = {}
        self._told: set[str] = set()
        self._ranges: dict[Hashable, list[tuple[int, int]]] = {}
        """By kind: the least and the largest of the whole numbers among the blocks' arguments, in all calls so far."""

    def find(self, kind: Hashable, call: StackCall, counts: Sequence[int]) -> tuple[bool, tuple[int, Cut] | None]:
        """Return whether a call is of a known kind, and its number of samples and cut; None when it has no cut."""
        for known in self._known.get(kind, ()):
            if known is None:
                return True, None
            index, cut = known
            if cut.fits(call, counts[index]):
                return True, (counts[index], cut)
        return False, None

    def put(self, kind: Hashable, known: tuple[int, Cut] | None) -> None:
        """Remember what was found: which count is that of the samples, and the cut."""
        self._known.setdefault(kind, []).append(known)

    def forget(self, kind: Hashable) -> None:
        """Forget the cuts of a kind of call: it has none."""
        self._known[kind] = [None]

    def has_new_numbers(self, kind: Hashable, call: StackCall) -> bool:
        """Whether whole numbers among the blocks' arguments are beyond those of the calls before: what they name is."""
        found = [each.aminmax() for each in call.side_inputs if are_numbers(each)]
        ranges = [(int(low), int(high)) for low, high in found]
        known = self._ranges.get(kind, ranges)
        self._ranges[kind] = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(ranges, known, strict=True)]
        return self._ranges[kind] != known

    def tell(self, reason: str) -> None:
        """Say once why the blocks get a batch whole."""
        if reason not in self._told:
            self._told.add(reason)
            log.warning(_NOT_CUT, reason)


def ask(
    form: CallForm,
    earlier: Sequence[CallForm],
    asked: Sequence[Question],
    thread: StepThread,
    ambient: Ambient,
    undo: Callable[[], None],
) -> list[tuple[int, Cut]]:
    """Find where a call of this form may be cut, and the number of its samples; there may be several ways.

    Args:
        form: Of the call with the batch itself.
        earlier: The forms of the calls that the same function made before.
        asked: The questions.
        thread: Where the user's code runs.
        ambient: How it runs.
        undo: Undoes what it changes.

    Raises:
        NotCuttable: No question has an answer.
    """
    found: dict[int, Cut] = {}
    before = Snapshot(stacks=False)
    counts = dict.fromkeys(question.num_samples for question in asked)
    reasons = {
        count: NO_DIMENSION.format(shape=list(form.forms[0]), count=count)
        for count in counts
        if not form.may_have(count)
    }
    likely = [count for count in counts if count not in reasons][:_MOST_ASKED]
    for question in asked:
        count = question.num_samples
        if count in found or count in reasons or count not in likely:
            continue
        try:
            other = _form_with(question, len(earlier), thread, ambient)
            cut = find_cut(form, other, count, question.num_others)
            if question.has_packed and cut.hidden.rows > 1:  # as many rows of each sample as of any other, by chance
                raise NotCuttable(NO_DIMENSION.format(shape=list(form.forms[0]), count=count))
            found[count] = cut
        except NotCuttable as error:
            reasons[count] = str(error)
        except _Unanswered as error:
            reasons.setdefault(-count, str(error))
        finally:
            thread.abandon()
            before.take_back()  # a question that failed has not switched off what it had switched on
            undo()
    if found:
        return list(found.items())
    raise NotCuttable(next(iter([*(reasons[count] for count in reasons if count > 0), *reasons.values()])))


class _Unanswered(Exception):
    """The user's code does not bear a batch of another size."""


def _form_with(question: Question, num_before: int, thread: StepThread, ambient: Ambient) -> CallForm:
    try:
        outcome = thread.start(question.function, ambient)
        for _ in range(num_before):
            if isinstance(outcome, Suspended):
                call: StackCall = outcome.request
                device = call.hidden.device
                call.fill(functools.partial(TensorSpec.zeros, device=device))
                outcome = thread.resume(call.specs[-1].zeros(device))
    except SkipPipeError:
        raise
    except Exception as error:
        if is_of_device(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _Unanswered(
            f"with {question.num_others} samples instead of {question.num_samples} the step ends in {reason}"
        ) from error
    if not isinstance(outcome, Suspended):
        raise NotCuttable("how often the blocks are called depends on the number of samples")
    return CallForm.of(outcome.request)
