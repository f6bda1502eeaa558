"""How made-up results of the blocks depend on side inputs that carry a gradient, so that gradients reach these.

Values do not change: what is added is zero. Each sample's result depends on its own rows, wherever these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..driver.capture.stack_call import StackCall


@dataclass(slots=True)
class SideAxes:
    """Which dimension of a side input is the batch's, by call and slot; None for what all samples share."""

    known: dict[tuple[int, int], int | None] = field(default_factory=dict)
    guesses: bool = False
    """Whether samples are taken to share what is not known: of one that is not cut they may."""

    def learn(self, number: int, whole: StackCall, parts: Sequence[StackCall]) -> None:
        """Compare a call by the batch, its ``number``-th, with those by microbatches."""
        for slot in whole.beside.carrying:
            if any(slot not in part.beside.carrying for part in parts):
                continue
            shape, *shapes = (tuple(call.side_inputs[slot].shape) for call in (whole, *parts))
            if any(len(other) != len(shape) for other in shapes):
                continue
            changed = [dim for dim, size in enumerate(shape) if any(other[dim] != size for other in shapes)]
            if not changed:
                self.known[number, slot] = None
            elif len(changed) == 1 and sum(other[changed[0]] for other in shapes) == shape[changed[0]]:
                self.known[number, slot] = changed[0]

    def zeros(self, number: int, call: StackCall, made: Tensor, dim: int, size: int) -> Tensor | None:
        """Return what to add to a result of so many samples in a dimension; None where nothing is known."""
        found: Tensor | None = None
        for slot in call.beside.carrying if call.ambient.grad and made.ndim else ():
            side = call.side_inputs[slot]
            is_known = self.guesses or (number, slot) in self.known
            if not is_known or not side.is_floating_point() or made.shape[dim] % size:
                continue
            values = torch.sin(torch.nan_to_num(side.float(), 0.0, 0.0, 0.0)).to(made.device)
            axis = self.known.get((number, slot))
            if axis is None:
                own = values.mean()
            elif side.numel() and not side.shape[axis] % size:
                by_sample = values.movedim(axis, 0).reshape(size, -1).mean(1)
                rows = by_sample.repeat_interleave(made.shape[dim] // size)
                own = rows.reshape([-1 if each == dim else 1 for each in range(made.ndim)])
            else:
                continue
            found = own - own.detach() if found is None else found + (own - own.detach())
        return None if found is None else found * _uneven(made, dim)


def _uneven(made: Tensor, dim: int) -> Tensor:
    """Return factors that differ along the last dimension: what is added evenly, a norm behind takes out again."""
    if made.ndim - 1 == dim:
        return torch.ones((), device=made.device)
    return (torch.rand(made.shape[-1], generator=torch.Generator().manual_seed(0)) + 0.5).to(made.device)
