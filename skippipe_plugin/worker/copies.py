"""The copies here of tensors that the driver has, since several blocks share them: see :mod:`..driver.shared`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor, nn

from ..engine.attributes import have_equal_bits
from ..engine.control.answers import Done
from ..engine.control.commands import Share
from ..engine.errors import SkipPipeError
from ..engine.handover import pack_gradients, unpack_tensors
from ..engine.stage import Stage
from ..engine.wire import tensor_key

_COMPARED: Final = 2


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the copies have gathered in a step, by the driver's numbers."""

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    in_half: Sequence[int] = ()
    """Those whose gradients are computed in float16."""

    def added_to(self, done: Done) -> Done:
        """Return an answer that tells of this, too."""
        if not self.gradients:
            return done
        entries, blobs = pack_gradients(self.gradients)
        return replace(done, shared=entries, in_half=self.in_half, blobs=blobs)


class SharedCopies:
    """The copies of one worker; blocks that have come together may have one object, others have their own."""

    def __init__(self) -> None:
        self._copies: dict[str, tuple[str, ...]] = {}
        """By number: their names, ``"<block>\\t<name>"``."""
        self._versions: dict[str, int] = {}
        """By name: how often torch had counted a write when the driver's value was there."""
        self._values: dict[str, Tensor] = {}
        """By number: what the driver has sent, while that is compared with the copies after a step."""
        self._num_compared = 0

    def __bool__(self) -> bool:
        return bool(self._copies)

    def overwrite(self, command: Share, own: Mapping[str, Tensor]) -> None:
        """Let copies among a worker's ``own`` tensors be what the driver has."""
        values = unpack_tensors(command.tensors, command.blobs)
        with torch.no_grad():
            for number, names in command.copies.items():
                self._copies[number] = tuple(names)
                for tensor in {id(own[name]): own[name] for name in names}.values():
                    tensor.copy_(values[number])
                self._versions.update({name: own[name]._version for name in names})
        if self._num_compared < _COMPARED:
            self._values |= values

    def gather(self, stages: Mapping[int, Stage], own: Mapping[str, Tensor], skip: Collection[int]) -> Gathered:
        """Take the gradients of a step's copies away, which no optimizer here is to see; return their sums.

        Args:
            stages: What is held.
            own: All tensors in that.
            skip: The stages of which another worker, who has the same, tells.
        """
        total: dict[str, Tensor] = {}
        in_half: set[int] = set()
        half = set().union(*(stage.in_half for stage in stages.values()))
        silent = {block for number in skip for block in stages[number].blocks}
        for number, names in self._copies.items():
            for name in names:
                copy = own[name]
                if isinstance(copy, nn.Parameter) and self._is_written(number, name, copy):
                    self._refuse(name)
                gradient, copy.grad = copy.grad, None
                if gradient is None or tensor_key(name)[0] in silent:
                    continue
                total[number] = total[number] + gradient if number in total else gradient
                if id(copy) in half:
                    in_half.add(int(number))
        self._values.clear()
        self._num_compared += 1
        return Gathered(total, sorted(in_half))

    def _is_written(self, number: str, name: str, copy: nn.Parameter) -> bool:
        """Whether a block has written a parameter; what torch does not count is seen in the first steps only."""
        sent = self._values.get(number)
        different = sent is not None and not have_equal_bits(copy.detach(), sent.to(copy.device))
        return different or copy._version != self._versions[name]

    def _refuse(self, name: str) -> None:
        block, local = tensor_key(name)
        raise SkipPipeError(
            f"the forward of block {block} writes {local}, which other blocks or the rest of the model have, too: they "
            "have copies of it on other machines, which would not see that. Give each block a parameter of its own, or "
            "write it outside of the blocks, between steps"
        )
