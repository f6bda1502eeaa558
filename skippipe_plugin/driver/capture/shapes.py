"""What each block does to the form of its input, learned once from the blocks themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ...engine.stage import Probe, ReturnStructure
from ...engine.taps import own_hooks
from ...engine.transport import TensorSpec

_Signature = tuple[object, ...]
Mode = tuple[bool, bool]
"""Whether gradients are on, and whether the block is in training."""


class ShapeBook:
    """Knows output specs and return structures; asks ``probe`` about what it does not know.

    Blocks of the same class with parameters of the same shapes behave alike, in the same mode: with gradients or
    without, in training or not. A kind of block that once kept the form of its input is taken to keep every form; the
    worker checks that at every call.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._signatures = [_signature(block) for block in blocks]
        self._keeping: dict[tuple[_Signature, Mode], ReturnStructure] = {}
        self._known: dict[tuple[_Signature, Mode, TensorSpec], Probe] = {}

    def is_settled(self, modes: Sequence[Mode]) -> bool:
        """Whether every block is known to keep the form of its input, so that nothing need be asked any more."""
        return all(each in self._keeping for each in zip(self._signatures, modes, strict=True))

    def alike(self, block: int) -> list[int]:
        """Return the blocks of the same kind."""
        return [index for index, each in enumerate(self._signatures) if each == self._signatures[block]]

    def output(self, block: int, enters: TensorSpec, mode: Mode, probe: Callable[[], Probe], *, ask: bool) -> Probe:
        """Return what ``block`` makes of a tensor of spec ``enters``.

        With ``ask`` each mode is asked about, without it only what is known in none.
        """
        signature = self._signatures[block]
        other: Mode = (not mode[0], mode[1])
        for each in (mode, other, (mode[0], not mode[1]), (other[0], not mode[1])):
            if (signature, each) in self._keeping:
                return Probe(enters, self._keeping[signature, each])
            if (signature, each, enters) in self._known:
                return self._known[signature, each, enters]
            if ask:
                break
        found = self._known[signature, mode, enters] = probe()
        if found.output == enters:
            self._keeping[signature, mode] = found.structure
        return found


def _signature(block: nn.Module) -> _Signature:
    shapes = tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in block.named_parameters())
    return (type(block), shapes, block.extra_repr(), tuple(own_hooks(block)))
