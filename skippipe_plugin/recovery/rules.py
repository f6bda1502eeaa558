"""Weights for a lost stage from the stages around it.

CheckFree (arXiv 2506.15461): residual blocks of neighbouring depth do similar work, so the average of the two
neighbouring stages, each weighted by the norm of its last gradient, is a good start for a stage that was lost with all
its copies; the end stages, which have one neighbour only, start as its copy. The optimizer's state starts empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from .experts import align_experts

RebuildRule = Literal["norm", "squared", "mean", "copy"]
"""How two neighbours are weighted: by their gradients' L2 norms (CheckFree's code), by the squares of those (its
paper's summaries), equally, or not at all: the copy of the one before."""

REBUILD_RULES: Final[tuple[RebuildRule, ...]] = get_args(RebuildRule)
_FLOOR: Final = 1e-4
"""Added to each weight, as CheckFree's code does: two neighbours without gradients count alike."""

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A living stage beside the lost one."""

    blocks: Sequence[State]
    """By block, in order: parameters and buffers by name."""
    gradient_norm: float
    """The L2 norm of the stage's last gradient, before the clipping of all stages together."""

    def weight(self, rule: RebuildRule) -> float:
        """How much this neighbour counts."""
        if rule in ("mean", "copy"):
            return 1.0
        return self.gradient_norm ** (2 if rule == "squared" else 1) + _FLOOR


def rebuild_stage(
    num_blocks: int, before: Neighbour | None, after: Neighbour | None, rule: RebuildRule = "norm"
) -> list[dict[str, Tensor]]:
    """Return a state for each block of a lost stage.

    Block k takes the blocks of the neighbours at the same relative depth, so that stages of different sizes fit.

    Args:
        num_blocks: How many blocks the lost stage has.
        before: The nearest living stage before it; None when there is none.
        after: The nearest living stage after it.
        rule: How the two are weighted.

    Raises:
        ValueError: There is no neighbour, or blocks differ in names or shapes.
    """
    if before is None and after is None:
        raise ValueError("no stage is left to rebuild the lost one from")
    if rule == "copy" and before is not None:
        after = None
    states = []
    for block in range(num_blocks):
        sources = [
            (side.blocks[opposite(block, num_blocks, len(side.blocks), ahead=side is after)], side.weight(rule))
            for side in (before, after)
            if side is not None
        ]
        states.append(rebuild_block([state for state, _ in sources], [weight for _, weight in sources]))
    return states


def opposite(block: int, num_blocks: int, num_others: int, *, ahead: bool) -> int:
    """Return which of ``num_others`` blocks lies at the relative depth of ``block`` of ``num_blocks``.

    Of two that are equally near, the one whose depth in the model is nearer: the first of a stage ``ahead``.

    >>> [opposite(k, 3, 2, ahead=True) for k in range(3)], [opposite(k, 3, 2, ahead=False) for k in range(3)]
    ([0, 0, 1], [0, 1, 1])
    """
    # Middles of blocks, in units that make both whole numbers: (k + 1/2) / n against (j + 1/2) / m.
    distances = [abs((2 * block + 1) * num_others - (2 * other + 1) * num_blocks) for other in range(num_others)]
    nearest = [other for other, distance in enumerate(distances) if distance == min(distances)]
    return nearest[0] if ahead else nearest[-1]


def rebuild_block(states: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted average of block states; tensors that are not floating point are copied from the first.

    Experts are brought into the order of the first state's.

    Raises:
        ValueError: The states differ in names or shapes.
    """
    first = states[0]
    shares = [weight / sum(weights) for weight in weights]
    for state in states[1:]:
        _check_alike(first, state)
    alike = [first, *(align_experts(first, state) for state in states[1:])]
    return {name: _average([state[name] for state in alike], shares) for name in first}


def _average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = tensors[0]
    if not (first.is_floating_point() or first.is_complex()) or len(tensors) == 1:
        return first.clone()
    # In double precision, so that equal tensors average to themselves in any lower one.
    wide = torch.complex128 if first.is_complex() else torch.float64
    parts = [tensor.to(wide) * share for tensor, share in zip(tensors, shares, strict=True)]
    return torch.stack(parts).sum(0).to(first.dtype)


def _check_alike(first: State, other: State) -> None:
    if first.keys() != other.keys():
        raise ValueError(f"blocks of neighbouring stages differ in {sorted(first.keys() ^ other.keys())}")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in one neighbouring stage and {tuple(other[name].shape)} in "
                "the other, so their average does not exist; give such stages a replica"
            )
