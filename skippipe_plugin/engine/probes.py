"""What a block does to its input, as it was found when the block was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .attributes import Key
from .returned import ReturnStructure, tensors_of
from .transport import TensorSpec


@dataclass(frozen=True, slots=True)
class Probe:
    """What one block does to its input: the output's spec and the structure of its return value."""

    output: TensorSpec
    """Of the hidden states."""
    structure: ReturnStructure
    """Of all that the block returns."""
    writes: tuple[Key, ...] = ()
    """The plain attributes that the block's forward writes."""
    idle: tuple[tuple[int, bool, int], ...] = ()
    """The hooks that came along and return nothing, as :meth:`skippipe_plugin.engine.taps.Returns.idle` names them."""
    changes_input: bool = False
    """Whether it changes the hidden states that enter it in place."""
    passes_input: bool = False
    """Whether its output shares memory with its input."""
    buffers: tuple[str, ...] = ()
    """The buffers that the block's forward writes."""
    weights: tuple[str, ...] = ()
    """The parameters that it writes."""
    lasting: tuple[str, ...] = ()
    """The plain attributes that it writes in training, where forwards after it, or evaluation, show that."""

    @classmethod
    def of(cls, output: Any, inputs: Tensor, *, changed: bool) -> Probe:  # Any: what a block returns
        """Describe what a block has returned; ``changed``: whether it has changed what it got."""
        memory = inputs.untyped_storage().data_ptr()
        passes = any(each.untyped_storage().data_ptr() == memory and each.numel() > 0 for each in tensors_of(output))
        structure = ReturnStructure.of(output)
        return cls(structure.tensors[0], structure, changes_input=changed, passes_input=passes)
