"""What a block returns: a tree whose tensors are its hidden states, first, and what it passes on beside them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import SkipPipeError
from .transport import TensorSpec


@dataclass(frozen=True, slots=True)
class ReturnedTensor:
    """Stands in what a block returns for one of its tensors, each of which has one number."""

    number: int


@dataclass(frozen=True, slots=True)
class ReturnedObject:
    """Stands for a part that is neither a tensor nor plain, and stays where the block runs."""


_PLAIN: Final = (type(None), bool, int, float, str)


@dataclass(frozen=True, slots=True)
class ReturnStructure:
    """The tree that a block returns, without its tensors."""

    tree: Any  # Any: containers of the user's, with what stands for a tensor or an object, and constants
    tensors: tuple[TensorSpec, ...]
    """By number; the first are the hidden states."""
    is_bare: bool = False
    """Whether the block returns its hidden states and nothing else."""

    @classmethod
    def of(cls, output: Any) -> ReturnStructure:  # Any: what a block returns
        """Describe what a block has returned."""
        tensors = tensors_of(output)
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}

        def stand_in(part: Any) -> Any:  # Any: a leaf of what the block returns
            if isinstance(part, Tensor):
                return ReturnedTensor(numbers[id(part)])
            return part if isinstance(part, _PLAIN) else ReturnedObject()

        return cls(mapped(output, stand_in), tuple(map(TensorSpec.of, tensors)), isinstance(output, Tensor))

    @property
    def has_numbers(self) -> bool:
        """Whether there are numbers or texts in it, which may follow from values."""
        return any(isinstance(leaf, (int, float, str)) for leaf in leaves_of(self.tree))

    def agreeing(self, other: ReturnStructure) -> ReturnStructure:
        """Return the same with an object in the place of each constant that is another one in ``other``."""
        mine, theirs = leaves_of(self.tree), leaves_of(other.tree)
        alike = iter([a == b or a != a for a, b in zip(mine, theirs, strict=False)])

        def change(part: Any) -> Any:  # Any: a leaf of the tree
            same = next(alike, False)
            return part if same or isinstance(part, ReturnedTensor) else ReturnedObject()

        return dataclasses.replace(self, tree=mapped(self.tree, change))

    def wrap(
        self, tensor: Callable[[int, int], Any], unknown: Callable[[int], Any]
    ) -> Any:  # Any: what the user's model expects of its block
        """Return what the block itself would.

        Args:
            tensor: Makes what stands for a tensor, of its number and its place among the leaves of the tree.
            unknown: Makes what stands for an object, of its place.
        """
        places = itertools.count()

        def fill(part: Any) -> Any:  # Any: a leaf of the tree
            place = next(places)
            if isinstance(part, ReturnedTensor):
                return tensor(part.number, place)
            return unknown(place) if isinstance(part, ReturnedObject) else part

        return mapped(self.tree, fill)


def tensors_of(output: Any) -> list[Tensor]:  # Any: what a block returns
    """Return the tensors in what a block returns, each once, its hidden states first.

    Raises:
        SkipPipeError: There is none.
    """
    found = tensors_in(output)
    if not found:
        raise SkipPipeError(f"a block returned {type(output).__name__}, not a tensor of hidden states")
    return found


def tensors_in(value: Any) -> list[Tensor]:  # Any: containers of the user's
    """Return the tensors in a tree, each once."""
    return list({id(leaf): leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)}.values())


def leaves_of(value: Any) -> list[Any]:  # Any: containers of the user's
    """Return all leaves of a tree."""
    found: list[Any] = []

    def note(part: Any) -> Any:  # Any: a leaf of the tree
        found.append(part)
        return part

    mapped(value, note)
    return found


def hidden_of(output: Any) -> Tensor:  # Any: what a block returns
    """Return the hidden states in what a block returns: its first tensor."""
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return output if isinstance(output, Tensor) else tensors_of(output)[0]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:  # Any: containers of the user's
    """Return a tree with ``change`` applied to its leaves, looking into containers that torch knows and dataclasses."""

    def leaf(part: Any) -> Any:  # Any: what torch takes for a leaf
        if not dataclasses.is_dataclass(part) or isinstance(part, (type, Tensor, ReturnedTensor, ReturnedObject)):
            return change(part)
        held = {each.name: mapped(getattr(part, each.name), change) for each in dataclasses.fields(part) if each.init}
        return dataclasses.replace(part, **held)

    return pytree.tree_map(leaf, value)
