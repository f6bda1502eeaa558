"""Whether the gradient of a batch's loss follows from those of its microbatches' losses, as the loss itself does.

A loss may add up where its gradient does not: behind ``detach()``, and where a hook or a function of the user's own
computes over samples on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..engine.errors import SkipPipeError
from ..engine.gradient_hooks import no_gradient_hooks
from ..engine.independence import FACTORS, HALF_FACTORS, is_multiple
from .counting import View
from .reductions import Mean, Plan, Rule, Sum, sharing

GRADIENT: Final = "the gradient of the loss"
WHY: Final = "the loss itself does, but on the way back something is computed over samples, or kept from its gradient"
_FINE: Final = 2e-3, 2e-5
_COARSE: Final = 0.15, 0.02
"""How far gradients may be apart, relative to their own size and to that of the largest: of 32 bits, and of 16."""
_SHARE: Final = 0.01
"""More than this a share of 16 bits is not off by rounding alone, which evens out over the hidden states."""
_WORSE: Final = 3
_HALF_SCALE: Final = 2.0**12
"""A usual scale of losses in float16."""


@dataclass(frozen=True, slots=True)
class Slopes:
    """The gradient of one loss."""

    made: tuple[Tensor | None, ...]
    """By call of the blocks: with respect to the made-up hidden states."""
    weights: tuple[Tensor | None, ...]
    """With respect to the driver's own parameters."""
    factor: float
    """What the loss was multiplied with."""


def slopes_of(loss: Any, made: Sequence[Tensor], weights: Sequence[nn.Parameter], factor: float = 1.0) -> Slopes | None:
    """Return the gradient of ``loss``; None where it has none. Nobody's ``grad`` changes, nor does the graph end.

    Args:
        loss: Of the batch or of a microbatch.
        made: The made-up hidden states.
        weights: The driver's own parameters.
        factor: What the loss is multiplied with before; hooks may do something else with large gradients.
    """
    if not isinstance(loss, Tensor) or not loss.requires_grad or loss.numel() != 1:
        return None
    inputs: list[Tensor] = [each for each in (*made, *weights) if each.requires_grad]
    if not inputs:
        return None
    try:
        with no_gradient_hooks(weights):
            found = torch.autograd.grad(
                loss, inputs, torch.full_like(loss, factor), retain_graph=True, allow_unused=True
            )
    except SkipPipeError:
        raise
    except Exception:  # the step itself will say so
        return None
    known = {id(each): _dense(slope) for each, slope in zip(inputs, found, strict=True)}
    return Slopes(tuple(known.get(id(each)) for each in made), tuple(known.get(id(each)) for each in weights), factor)


def is_linear(loss: Any, made: Sequence[Tensor], weights: Sequence[nn.Parameter], *, is_half: bool = False) -> bool:
    """Whether the backward of ``loss`` makes multiples of multiples; true where it has none.

    Args:
        loss: Of the batch.
        made: The made-up hidden states.
        weights: The driver's own parameters.
        is_half: Whether it is computed in float16: then as one that is scaled.
    """
    factors, scale = (HALF_FACTORS, _HALF_SCALE) if is_half else (FACTORS, 1.0)
    one = slopes_of(loss, made, weights, scale)
    for factor in factors:
        other = slopes_of(loss, made, weights, scale * factor)
        if one is not None and other is not None:
            pairs = (*one.made, *one.weights), (*other.made, *other.weights)
            if not is_multiple(*pairs, factor, is_half=is_half):
                return False
    return True


def follows(
    whole: Slopes, parts: Sequence[Slopes], dims: Sequence[int], plan: Plan | None, view: View, *, is_coarse: bool
) -> bool:
    """Whether the batch's gradient is made of the parts' by one of the rules of the loss.

    Args:
        whole: The batch's.
        parts: The microbatches'.
        dims: By call of the blocks: the dimension of the samples.
        plan: What is known of the loss.
        view: The batch.
        is_coarse: Whether anything was computed in 16 bits, by autocast for instance.
    """
    known = [each for rule in sharing(plan) if (each := _shares_by(rule, len(parts), view)) is not None]
    return not known or any(_fits(whole, parts, dims, each, is_coarse=is_coarse) for each in known)


def refuted_by(whole: Slopes, parts: Sequence[Slopes], dims: Sequence[int], plan: Plan, view: View) -> frozenset[Rule]:
    """Return the rules of a loss whose shares are not those of its gradient, where others' are.

    A loss of 16 bits does not tell them apart: one mean is like the other within rounding. Its gradient has the share
    of a microbatch in each of the hidden states.

    Args:
        whole: The batch's.
        parts: The microbatches'.
        dims: By call of the blocks: the dimension of the samples.
        plan: What is known of the loss.
        view: The batch.
    """
    found = _shares(whole, parts, dims)
    off = {rule: _off(rule, found, view) for rule in sharing(plan)}
    worst = max(_SHARE, _WORSE * min(off.values(), default=0.0))
    return frozenset(rule for rule, error in off.items() if error > worst)


def _shares_by(rule: Mean | Sum, count: int, view: View) -> Sequence[float] | None:
    """Return by microbatch what share of its gradient the batch has by a rule; None where that weighs nothing."""
    return [1.0] * count if isinstance(rule, Sum) else view.shares(rule.weighting)


def _shares(whole: Slopes, parts: Sequence[Slopes], dims: Sequence[int]) -> list[float | None]:
    """Return what share of each microbatch's gradient the batch's has; None where that is not to be seen."""
    products = [[0.0, 0.0] for _ in parts]
    for number, (slope, dim) in enumerate(zip(whole.made, dims, strict=False)):
        pieces = [part.made[number] for part in parts if number < len(part.made)]
        present = [piece for piece in pieces if piece is not None and piece.ndim > dim]
        if slope is None or len(present) < len(parts):
            continue
        sizes = [piece.shape[dim] for piece in present]
        if slope.ndim <= dim or sum(sizes) != slope.shape[dim]:
            continue
        for product, piece, of_batch in zip(products, present, torch.split(slope, sizes, dim), strict=True):
            if piece.shape == of_batch.shape:
                product[0] += float((piece.double() * of_batch.double()).sum())
                product[1] += float(piece.double().square().sum())
    return [
        cross / square * part.factor if square > 0 else None
        for (cross, square), part in zip(products, parts, strict=True)
    ]


def _off(rule: Mean | Sum, found: Sequence[float | None], view: View) -> float:
    """Return by how much the shares of a rule are off, relative to those found."""
    shares = _shares_by(rule, len(found), view)
    if shares is None:
        return 0.0
    pairs = [(share, each) for share, each in zip(shares, found, strict=True) if each is not None and each > 0]
    return max((abs(share / each - 1) for share, each in pairs), default=0.0)


def _fits(
    whole: Slopes, parts: Sequence[Slopes], dims: Sequence[int], shares: Sequence[float], *, is_coarse: bool
) -> bool:
    pairs: list[tuple[Tensor, Tensor, float]] = []
    """The batch's, the same made of the parts', and how large the parts are."""
    shares = [share / part.factor for share, part in zip(shares, parts, strict=True)]
    for number, (slope, dim) in enumerate(zip(whole.made, dims, strict=False)):
        pieces = [part.made[number] if number < len(part.made) else None for part in parts]
        scaled = [None if piece is None else piece * share for piece, share in zip(pieces, shares, strict=True)]
        present = [piece for piece in scaled if piece is not None]
        if slope is not None and len(present) == len(parts):
            pairs.append((slope, *_joined(slope, present, dim)))
    for number, slope in enumerate(whole.weights):
        terms = [(part.weights[number], share) for part, share in zip(parts, shares, strict=True)]
        added = [piece * share for piece, share in terms if piece is not None]
        if slope is not None or added:
            zero = torch.zeros_like(added[0] if slope is None else slope)
            pairs.append((zero if slope is None else slope, sum(added, zero), sum(map(_size, added))))
    relative, absolute = _COARSE if is_coarse else _FINE
    if not pairs or any(not bool(torch.isfinite(each).all()) for pair in pairs for each in pair[:2]):
        return True
    largest = max(_size(slope) for slope, _, _ in pairs)
    return all(
        slope.shape == other.shape
        and _size(slope - other) <= relative * max(size, _size(slope)) + absolute * max(largest, size)
        for slope, other, size in pairs
    )


def _joined(slope: Tensor, pieces: Sequence[Tensor], dim: int) -> tuple[Tensor, float]:
    size = max(map(_size, pieces))
    if all(piece.shape == slope.shape for piece in pieces):  # they share what they have made up
        return sum(pieces[1:], pieces[0]), sum(map(_size, pieces))
    try:
        return torch.cat(list(pieces), dim), size
    except RuntimeError:
        return slope, size


def _size(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _dense(slope: Tensor | None) -> Tensor | None:
    if slope is None:
        return None
    return (slope if slope.layout is torch.strided else slope.to_dense()).detach()
