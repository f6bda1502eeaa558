"""What each microbatch's loss weighs in that of the batch, so that the parts add up to what one process computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..engine.errors import SkipPipeError
from .counting import Given, Samples
from .merging import Agree, Merging, alone
from .reductions import Mean, Sum, Unsettled, weighting_of
from .trials import LOSS

log = logging.getLogger(__name__)

_ALIKE: Final = (
    "the losses of all drivers count alike, however many samples or labels each batch has: what they are means over "
    "is not found out of batches that cannot be cut. microbatch_weight=... says it"
)


@dataclass(frozen=True, slots=True)
class LossWeights:
    """By microbatch of this driver: what its loss is multiplied with in that of the global batch."""

    weights: tuple[float, ...]
    share: float
    """One over the number of drivers."""
    is_sum: bool = False


def loss_weights(merging: Merging, agree: Agree = alone) -> LossWeights:
    """Return what the losses of a training step weigh.

    Args:
        merging: What is known about the step.
        agree: Gives every driver what each of them has.
    """
    rules = agree(_rule(merging))
    return _weights(merging, rules, _one_of(rules), agree)


def whole_share(merging: Merging, agree: Agree = alone) -> float:
    """Return what the loss of a step that runs once weighs among those of all drivers; see :func:`loss_weights`.

    Without a rule that all have found they weigh alike; of a batch that cannot be cut there is none but the user's.
    """
    is_known = not merging.question.uncut or callable(merging.weight)
    try:
        rule: Mean | Sum | None = _rule(merging) if is_known else None
    except SkipPipeError:
        rule = None
    rules = agree(rule)
    if len(rules) > 1 and not is_known and merging.asking.is_news("alike", merging.question.kind):
        log.warning(_ALIKE)
    try:
        weights = _weights(merging, rules, _one_of(rules), agree) if None not in rules else None
    except SkipPipeError:
        weights = None
    return 1 / len(rules) if weights is None or weights.is_sum else sum(weights.weights)


def _one_of(rules: Sequence[Mean | Sum]) -> Mean | Sum:
    """Return the rule of all drivers; of some the batch may not tell labels from samples."""
    special = [each for each in rules if each != Mean(Samples())]
    if any(each != special[0] for each in special):
        raise SkipPipeError(
            "the drivers found different reductions of the loss in their batches "
            f"({', '.join(map(str, rules))}); say which it is with microbatch_weight=..."
        )
    return special[0] if special else rules[0]


def _weights(merging: Merging, rules: Sequence[Mean | Sum], rule: Mean | Sum, agree: Agree) -> LossWeights:
    view, share = merging.question.view, 1 / len(rules)
    if isinstance(rule, Sum):
        return LossWeights((1.0,) * len(view.sizes), share, is_sum=True)
    assert isinstance(rule, Mean)
    weights = view.weights(rule.weighting)
    total = sum(weights or ())
    if len(rules) > 1 and rule != Mean(Samples()):
        total = sum(agree(total))
    if weights is None and total:  # only other drivers have what the loss is a mean over
        return LossWeights((0.0,) * len(view.sizes), share)
    if weights is None or not total:
        samples = view.shares(Samples())
        assert samples is not None
        return LossWeights(tuple(share * each for each in samples), share)
    if rule == Mean(Samples()):
        total *= len(rules)
    return LossWeights(tuple(each / total for each in weights), share)


def _rule(merging: Merging) -> Mean | Sum:
    weight = merging.weight
    if weight == "sum":
        return Sum()
    if callable(weight):
        return Mean(Given())
    if weight == "samples" or merging.answer is None or LOSS not in merging.answer.plans:
        return Mean(Samples())
    view = merging.question.view
    try:
        rule = weighting_of(merging.answer.plans[LOSS], view)
    except Unsettled as error:
        raise merging.unclear(LOSS, str(error)) from None
    return Mean(Samples()) if rule is None else rule
