"""What each microbatch's loss weighs in that of the batch, so that the parts add up to what one process computes."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.errors import SkipPipeError
from .counting import Given, Samples
from .merging import Agree, Merging, alone
from .reductions import Mean, Sum, Unsettled, weighting_of
from .trials import LOSS


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
    rule: Mean | Sum = _rule(merging)
    rules = agree(rule)
    special = [each for each in rules if each != Mean(Samples())]
    rule = special[0] if special else rule
    if any(each != rule for each in special):
        raise SkipPipeError(
            "the drivers found different reductions of the loss in their batches "
            f"({', '.join(map(str, rules))}); say which it is with microbatch_weight=..."
        )
    view, share = merging.question.view, 1 / len(rules)
    if isinstance(rule, Sum):
        return LossWeights((1.0,) * len(view.sizes), share, is_sum=True)
    assert isinstance(rule, Mean)
    weights = view.weights(rule.weighting)
    total = sum(weights or ())
    if len(rules) > 1 and rule != Mean(Samples()):
        total = sum(agree(total))
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
