"""What share of the batch's loss each microbatch has, so that the parts add up to what one process computes.

A mean over samples needs the samples' shares. Language models take the mean over the labels that are not ignored,
which microbatches of equal size have in unequal numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

IGNORED: Final = -100
"""The label that torch's and transformers' losses leave out."""


def loss_shares(model: nn.Module, calls: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> list[float]:
    """Return each microbatch's share of the batch's loss; they sum to 1.

    Args:
        model: The model, which may shift its labels, as language models of transformers do.
        calls: By microbatch, the keyword arguments of the model; ``labels`` counts.
        sizes: By microbatch, its number of samples.
    """
    counts = [_num_counted(model, call.get("labels")) for call in calls]
    weights = [count for count in counts if count is not None]
    if len(weights) < len(sizes) or not any(weights):
        weights = list(sizes)
    return [weight / sum(weights) for weight in weights]


def loss_is_summed(call: Mapping[str, Any]) -> bool:
    """Whether the caller gives the divisor of the loss (transformers' ``num_items_in_batch``), so that parts add up."""
    return call.get("num_items_in_batch") is not None


def _num_counted(model: nn.Module, labels: Any) -> int | None:
    """Count the labels that the loss takes the mean of; None when there are none to count."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
        return None
    counted = labels[..., 1:] if labels.ndim > 1 and _shifts(model) else labels
    return int(counted.ne(IGNORED).sum())


def _shifts(model: nn.Module) -> bool:
    """Whether each label is predicted from the tokens before it, so that the first one of a text is not used."""
    return getattr(getattr(model, "loss_function", None), "__name__", None) == "ForCausalLMLoss"
