"""What a model returns in eval mode while gradients are on: it has none, and whoever back-propagates reads why."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..engine.errors import SkipPipeError
from .asking import Asking
from .outputs import differentiable, guarded, map_tensors
from .trials import Key

_OUTPUT: Final[Key] = ("output",)
_EVAL: Final = (
    "backward went through what {model} returned in eval mode, in which a pipeline runs it without gradients. Call "
    "model.train() before the loop; what is to behave as in evaluation (dropout, BatchNorm) is set to eval() after "
    "that by itself, for instance by `for part in model.children(): part.eval()`. For evaluation use torch.no_grad()"
)


class Untrained:
    """Marks such results, so that they need a gradient where one process' would.

    Args:
        model: What is called.
        asking: Finds out which do.
    """

    def __init__(self, model: nn.Module, asking: Asking) -> None:
        self._model = model
        self._asking = asking
        self._flags: dict[Hashable, list[bool] | None] = {}

    def marked(self, output: Any, kind: Hashable, call: Callable[[], Any], given: Any) -> Any:
        """Return ``output`` such that a backward through it is refused.

        Args:
            output: What a call returned.
            kind: Calls of the same kind return alike.
            call: Is such a call.
            given: The arguments.
        """
        if not torch.is_grad_enabled() or not self._needs_gradients(given):
            return output
        if kind not in self._flags:
            self._flags[kind] = self._look(call, given)
        flags = self._flags[kind]
        if flags is None or len(flags) != len(_flags(output)):
            return output
        message = _EVAL.format(model=type(self._model).__name__)
        return guarded(map_tensors(torch.Tensor.detach, output), message, flags)

    def _needs_gradients(self, given: Any) -> bool:
        return any(parameter.requires_grad for parameter in self._model.parameters()) or bool(differentiable(given))

    def _look(self, call: Callable[[], Any], given: Any) -> list[bool] | None:
        try:
            found = self._asking.look(lambda: {_OUTPUT: call()}, given)
        except SkipPipeError:  # what is refused with gradients may do without them
            return None
        return None if found is None else _flags(found[_OUTPUT])


def _flags(output: Any) -> list[bool]:
    found: list[bool] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.requires_grad)
        return tensor

    map_tensors(note, output)
    return found
