"""Hooks on the gradients of parameters: of one backward's whole gradient, which comes in parts, one per microbatch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class GradientHooks:
    """Takes hooks off parameters for the time in which gradients come in parts, and puts them on again."""

    def __init__(self) -> None:
        self._taken: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # Any: torch's own tables of the user's functions

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Take the hooks off. Their tables stay, by which the user may remove them."""
        self.put_back()
        self.take_more(parameters)

    def take_more(self, parameters: Iterable[Tensor]) -> None:
        """Take those of further ones off, too."""
        for parameter in parameters:
            for table in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
                if table:
                    self._taken.append((table, dict(table)))
                    table.clear()

    def put_back(self) -> None:
        """Put the hooks on again."""
        taken, self._taken = self._taken, []
        for table, hooks in taken:
            table.update(hooks)


@contextmanager
def no_gradient_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Take the hooks off while gradients are made up, which are nobody's business."""
    hooks = GradientHooks()
    hooks.take(list(parameters))
    try:
        yield
    finally:
        hooks.put_back()


def hooked(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return what the parameter's hooks make of the whole gradient of a backward."""
    for hook in tuple((parameter._backward_hooks or {}).values()):
        result = hook(gradient)
        gradient = gradient if result is None else result
    return gradient


def call_accumulated(parameter: Tensor) -> None:
    """Call the hooks that wait for the accumulated gradient."""
    for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)
