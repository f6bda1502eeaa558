"""What each block does to the form of its input, learned once from the blocks themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from ...engine.stage import Probe, ReturnStructure
from ...engine.transport import TensorSpec

_Signature = tuple[object, ...]


class ShapeBook:
    """Knows output specs and return structures; asks ``probe`` about what it does not know.

    Blocks of the same class with parameters of the same shapes behave alike. A kind of block that once kept the form
    of its input is taken to keep every form; the worker checks that at every call.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._signatures = [_signature(block) for block in blocks]
        self._keeping: dict[_Signature, ReturnStructure] = {}
        self._known: dict[tuple[_Signature, TensorSpec], Probe] = {}

    @property
    def settled(self) -> bool:
        """Whether every block is known to keep the form of its input, so that nothing need be asked any more."""
        return all(signature in self._keeping for signature in self._signatures)

    def output(self, block: int, enters: TensorSpec, probe: Callable[[], Probe] | None = None) -> Probe:
        """Return what ``block`` makes of a tensor of spec ``enters``."""
        signature = self._signatures[block]
        if signature in self._keeping:
            return Probe(enters, self._keeping[signature])
        if (signature, enters) not in self._known:
            assert probe is not None, f"nothing is known about block {block} for {enters}"
            found = probe()
            self._known[signature, enters] = found
            if found.output == enters:
                self._keeping[signature] = found.structure
        return self._known[signature, enters]


def _signature(block: nn.Module) -> _Signature:
    shapes = tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in block.named_parameters())
    return (type(block), shapes, block.extra_repr())
