"""What enters a model with a gradient, and what else of the loop's graph is around the model.

A call of a spread model is a graph of its own, which goes back after the loop's. What enters it begins it: the gradient
of that goes further back, into an encoder in front of the model for instance, when the whole call has gone back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..driver.capture.graphs import AroundTheBlocks, reaches
from ..driver.capture.remote import is_remote
from ..engine.errors import SkipPipeError
from ..engine.stage import inner
from .outputs import map_tensors

_INPUTS: Final = (
    "backward(inputs=...) and torch.autograd.grad(...) ask for single gradients of what the model has computed, whose "
    "blocks are on workers: so only the gradients of what it has returned can be had. Call loss.backward() and read "
    ".grad of parameters and inputs (which need requires_grad_()); what is to have none is frozen with "
    "requires_grad_(False)"
)
_FREED: Final = (
    "the loss of this batch uses what has entered the model also on a way around it, which no batch did before, so "
    "that part of the graph was freed too early. Let every batch take that way (with a weight of 0 where it should not "
    "count), or call backward(retain_graph=True)"
)


_CHANGED: Final = (
    "a tensor that has entered the model (shape {shape}) was changed in place before the backward of what the model "
    "has made of it; autograd may have saved it. Make a new tensor instead (x = x + 1 in place of x += 1)"
)


class Entrance:
    """The tensors with a gradient among the arguments of a call.

    Args:
        of_model: Whether code here computes with them, and not only blocks elsewhere, which have their own.
    """

    def __init__(self, *, of_model: bool = True, is_hooked: bool = False) -> None:
        self._of_model = of_model
        self.is_hooked = is_hooked
        """Whether a hook was registered before, maybe on a gradient of what they were computed from."""
        self.tensors: list[Tensor] = []
        """As the loop has them."""
        self._leaves: list[Tensor] = []
        self._roots: list[GradientEdge] = []
        self._versions: list[int] = []

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments for the call itself."""
        if not any(map(_has_gradient, (*args, *kwargs.values()))):
            return args, kwargs
        inside: dict[int, Tensor] = {}
        enter = functools.partial(self._enter, inside)
        named = {name: map_tensors(enter, value) for name, value in kwargs.items()}
        return tuple(map_tensors(enter, value) for value in args), named

    def _enter(self, inside: dict[int, Tensor], tensor: Tensor) -> Tensor:
        if not tensor.requires_grad or tensor.is_meta or is_remote(tensor):
            return tensor
        if id(tensor) not in inside:
            leaf = tensor.detach().requires_grad_()
            self.tensors.append(tensor)
            self._leaves.append(leaf)
            self._roots.append(get_gradient_edge(tensor))
            self._versions.append(tensor._version)
            inside[id(tensor)] = inner(leaf)
        return inside[id(tensor)]

    def check(self) -> None:
        """Raise, where autograd would in one process, when one of them was changed in place since."""
        for tensor, before in zip(self.tensors, self._versions, strict=True) if self._of_model else ():
            if tensor._version != before:
                raise SkipPipeError(_CHANGED.format(shape=tuple(tensor.shape)))

    def undone_with(self, undo: Callable[[], None]) -> Callable[[], None]:
        """Return what undoes a call, its gradients here included."""
        if not self._leaves:
            return undo

        def undo_all() -> None:
            undo()
            self.take()

        return undo_all

    def take(self) -> list[Tensor | None]:
        """Return the gradients that have come to the tensors."""
        gradients = [leaf.grad for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        return gradients

    def go_back(self, *, keep_graph: bool) -> None:
        """Back-propagate further into what the loop has computed before the call."""
        gradients = self.take()
        roots, self.tensors, self._leaves, self._roots, self._versions = self._roots, [], [], [], []
        pairs = [(root, gradient) for root, gradient in zip(roots, gradients, strict=True) if gradient is not None]
        if not pairs:
            return
        starts, reached = zip(*pairs, strict=True)
        try:
            torch.autograd.backward(starts, reached, retain_graph=keep_graph)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise SkipPipeError(_FREED) from error


class LoopGraph:
    """What is known of the graphs of a loop around the calls of its model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._around = AroundTheBlocks()

    def keeps_graph(self, outputs: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
        """Whether a backward of ``outputs`` must leave a graph that goes back again, from ``before``."""
        return bool(before) and self._around.look(outputs, *before)

    def check_inputs(self, outputs: Sequence[Tensor], inputs: Sequence[Any], entered: Sequence[Tensor]) -> None:
        """Refuse to go back from ``outputs`` to some tensors only, unless the loop itself has computed with these.

        Args:
            outputs: Of which some come from the model.
            inputs: Tensors, or edges of the graph.
            entered: What has entered the model.
        """
        own = {id(parameter) for parameter in self._model.parameters()}
        for each in inputs:
            foreign = isinstance(each, Tensor) and id(each) not in own and not is_remote(each)
            reached = foreign and any(reaches(output, each) for output in outputs)
            if not reached or any(reaches(tensor, each) for tensor in entered):
                raise SkipPipeError(_INPUTS)


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(map(_has_gradient, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_has_gradient, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return any(_has_gradient(getattr(value, each.name)) for each in dataclasses.fields(value))
    return False
