"""Compare what one step leaves in one process and in a pipeline, and say what a difference means.

What runs the two steps is for the frameworks' sides; here is the comparison, and what makes a model fit for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

_DOUBLE_TOLERANCE: Final = 1e-6
_TOLERANCE: Final = 1e-3
"""How far two values may be apart, relative to the tensor's largest: in double precision, and otherwise."""
_FLOOR: Final = 1e-3
"""The share of that which is allowed to values that are zero but for rounding."""
WAYS_OUT: Final[tuple[Mapping[str, Any], ...]] = ({"microbatches": "stack"}, {"num_microbatches": 1})
"""Settings with which more is exact, the better one first."""
Quantity = Literal["loss", "logged", "gradient", "weight"]
_WORDS: Final[Mapping[Quantity, str]] = {
    "loss": "the loss",
    "logged": "the logged value",
    "gradient": "the norm of the gradient of",
    "weight": "the updated",
}


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """What one training step left."""

    loss: float | None
    logged: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    """By parameter: the norm of its gradient, of those that could be read."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """After the optimizer's step: parameters and buffers."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first quantity in which a pipeline's step is not that of one process."""

    quantity: Quantity
    name: str
    found: float
    expected: float

    def __str__(self) -> str:
        what = f"{_WORDS[self.quantity]} {self.name}".strip()
        return f"{what} is {self.found:.7g} in the pipeline and {self.expected:.7g} in one process"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two steps that left the same.

    >>> print(Agreement(num_gradients=3, num_weights=4, largest=2e-9))
    the same loss, 3 gradients and 4 updated tensors as in one process; the largest relative difference is 2e-09
    """

    num_gradients: int
    num_weights: int
    largest: float
    """The largest relative difference."""

    def __str__(self) -> str:
        return (
            f"the same loss, {self.num_gradients} gradients and {self.num_weights} updated tensors as in one process; "
            f"the largest relative difference is {self.largest:.1g}"
        )


def compare(found: StepEvidence, expected: StepEvidence) -> Agreement | Difference:
    """Compare the step of a pipeline with that of one process; the first difference that is more than rounding."""
    double = any(tensor.dtype == torch.float64 for tensor in expected.weights.values())
    tolerance, largest = _DOUBLE_TOLERANCE if double else _TOLERANCE, 0.0
    for quantity, name, one, other in _pairs(found, expected):
        difference, worst = _apart(one, other, tolerance)
        if not difference <= tolerance:
            return Difference(quantity, name, float(one.flatten()[worst]), float(other.flatten()[worst]))
        largest = max(largest, difference)
    num_gradients = len(found.gradients.keys() & expected.gradients.keys())
    return Agreement(num_gradients, len(expected.weights), largest)


def without_randomness(model: nn.Module) -> None:
    """Switch every dropout in ``model`` off: microbatches draw other masks than a whole batch, by design."""
    for part in model.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(part).__name__)):
                setattr(part, name, 0.0)


def explain(
    difference: Difference, *, is_random: bool, way_out: Mapping[str, Any] | None, in_blocks: bool, is_buffer: bool
) -> tuple[str, str]:
    """Return the likely kind of a difference, and what to do.

    Args:
        difference: It.
        is_random: Whether one process differs from itself when it starts from another seed.
        way_out: The settings with which a pipeline leaves the same as one process, if some of ``WAYS_OUT`` are.
        in_blocks: Whether the tensor belongs to the blocks on workers.
        is_buffer: Whether it is a buffer.
    """
    if is_random:
        return (
            "the step draws random numbers beside dropout, and each microbatch draws its own",
            "num_microbatches=1 where the draws must be those of one process",
        )
    if way_out is not None:
        advice = ", ".join(f"{name}={value!r}" for name, value in way_out.items())
        if is_buffer:
            return "a buffer that each microbatch updates, such as the statistics of a BatchNorm", advice
        return (
            "a reduction over the batch: the loss, a logged value or a layer is no mean over samples, or looks at all "
            "samples together (BatchNorm, a contrastive loss), while each microbatch has its own",
            f"{advice}, with which this step is that of one process",
        )
    if difference.quantity in ("loss", "logged"):
        return (
            "the blocks compute something else on their workers: an attribute, a patched method or a global that they "
            "do not get, a hook, or code between the blocks",
            "move what changes the blocks into their forward or their arguments",
        )
    if difference.quantity == "gradient" or not in_blocks:
        return (
            "gradients: a hook on a parameter, an own backward, or code that reads or changes gradients or weights of "
            "blocks that are elsewhere",
            "leave gradients to the optimizer and to Trainer(gradient_clip_val=...)",
        )
    return (
        "the optimizer's step: a hook that writes weights, or an optimizer that looks at all parameters together",
        "change weights before fit, and use an optimizer that treats each parameter by itself",
    )


def _pairs(found: StepEvidence, expected: StepEvidence) -> Iterator[tuple[Quantity, str, Tensor, Tensor]]:
    yield "loss", "", _scalar(found.loss), _scalar(expected.loss)
    for name, value in expected.logged.items():
        yield "logged", name, _scalar(found.logged.get(name)), _scalar(value)
    for name, norm in expected.gradients.items():
        if name in found.gradients:
            yield "gradient", name, _scalar(found.gradients[name]), _scalar(norm)
    for name, tensor in expected.weights.items():
        yield "weight", name, found.weights[name].double().cpu(), tensor.double().cpu()


def _scalar(value: float | None) -> Tensor:
    return torch.tensor([math.nan if value is None else value], dtype=torch.float64)


def _apart(one: Tensor, other: Tensor, tolerance: float) -> tuple[float, int]:
    """Return how far two tensors are apart, relative to the largest value, and where most."""
    if one.numel() == 0:
        return 0.0, 0
    both_undefined = (one == other) | (one.isnan() & other.isnan())
    distance = torch.where(both_undefined, 0.0, (one - other).abs())
    worst = int(distance.nan_to_num(math.inf, math.inf).flatten().argmax())
    scale = max(float(other.nan_to_num(0.0, 0.0, 0.0).abs().max()), _FLOOR * tolerance)
    difference = float(distance.flatten()[worst]) / scale
    return (math.inf if math.isnan(difference) else difference), worst
