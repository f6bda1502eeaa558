"""The tensor that entered the first block: what the blocks do to it in one process, the driver's code must not miss.

Blocks run elsewhere and later. So the tensor must stay as it is until they have run; and if they change it in place
(a pre-activation ``ReLU(inplace=True)``), whoever reads it afterwards would find it unchanged: it is made unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...engine.arguments import versions
from ...engine.errors import SkipPipeError
from ...engine.probes import Probe
from ...engine.stage import inner
from .graphs import root_of
from .token import FORM_QUESTIONS, function_name


class EnteredStack:
    """What entered the first block of one call."""

    def __init__(self, hidden: Tensor, *, is_hooked: bool = False) -> None:
        self.is_hooked = is_hooked
        """Whether the step had registered a hook by then, maybe on a gradient of what this was computed from."""
        self.hidden = hidden
        """What the blocks get, attached to the driver's graph."""
        self.root = root_of(hidden)
        """Where its gradient goes."""
        self._version = versions([hidden])
        self.is_passed_on = True
        """Whether the blocks so far have handed it on, itself or a view of it."""
        self.changed_by = ""
        """The block that changes it in place; empty: none does."""
        self._seen: Tensor | None = None

    def passed(self, name: str, probe: Probe) -> None:
        """Note what the next block does to its input."""
        if self.is_passed_on and probe.changes_input:
            self.changed_by = self.changed_by or name
        self.is_passed_on &= probe.passes_input

    def check_apart(self, name: str, side_inputs: Iterable[Tensor]) -> None:
        """Raise when a block gets, beside its hidden states, the memory that has been changed in place."""
        memory = self.hidden.untyped_storage().data_ptr()
        if any(memory and memory == side.untyped_storage().data_ptr() for side in side_inputs):
            raise SkipPipeError(
                f"{name} gets the tensor that entered the first block beside its hidden states, and {self.changed_by} "
                "changes that in place, on a worker, which other workers do not see. Let the block make a new tensor "
                "(inplace=False), or give it a copy: block(x.clone())"
            )

    def close(self) -> None:
        """All blocks were called: part from what the code after them must not read if they change it."""
        self.check()
        if self.changed_by:
            self._seen = self.hidden
            self.hidden = inner(self.hidden) if self.hidden.requires_grad else self.hidden.detach()
            self.root = root_of(self.hidden)

    def hide(self) -> None:
        """The blocks have run: make unreadable what they have changed elsewhere."""
        for tensor in (self._seen, self._seen._base if self._seen is not None else None):
            if type(tensor) is Tensor and (tensor is self._seen or tensor.requires_grad):
                tensor.__class__ = ChangedInput
                tensor.__dict__["_changed_by"] = self.changed_by

    def check(self) -> None:
        """Raise when the driver's code has changed the tensor in place since the first block was called."""
        if not self.changed_by and versions([self.hidden]) != self._version:
            raise SkipPipeError(
                f"the hidden states that entered the first block (shape {tuple(self.hidden.shape)}) were changed in "
                "place before the blocks had run. Blocks of a pipeline run after the code around them, so they would "
                "get the changed ones; make a new tensor instead (x = x + 1 in place of x += 1)"
            )


class ChangedInput(Tensor):
    """A tensor of the driver's that blocks elsewhere have changed in place, as far as user code is concerned."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),  # Any: whatever the torch function takes
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = function_name(func)
        if name in FORM_QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        block = next((each.__dict__["_changed_by"] for each in args if isinstance(each, ChangedInput)), "a block")
        raise SkipPipeError(
            f"{block} changes the hidden states that enter it in place, on a worker, and then the driver's code uses "
            f"that tensor ({name}), which has not changed here. Let the block make a new tensor (inplace=False), or "
            "give it a copy: block(x.clone())"
        )
