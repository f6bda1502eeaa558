"""What a model returns: the loss in it, the whole batch's output from the microbatches', and what stays differentiable.

Nothing here knows a pipeline. Outputs are tensors, tuples, mappings or transformers' ``ModelOutput``; their type stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..driver.capture.caches import OF_MICROBATCHES, close, is_cache
from ..driver.capture.microbatch import rebuild_mapping, rebuild_sequence
from ..engine.errors import SkipPipeError


def find_loss(output: Any) -> Tensor | None:
    """Return the loss that a model's output holds; None when it holds none.

    A loss is a scalar with a gradient: the output itself, its entry ``"loss"``, or the first entry of a tuple.

    >>> find_loss({"loss": torch.ones((), requires_grad=True), "logits": torch.ones(4, 2)})
    tensor(1., requires_grad=True)
    >>> find_loss((torch.ones(4, 2), torch.ones(()))) is None
    True
    """
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif isinstance(output, (tuple, list)):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) and output.ndim == 0 and output.is_floating_point() else None


def with_loss(output: Any, loss: Tensor | None) -> Any:
    """Return ``output`` with another loss in the place of its own."""
    if isinstance(output, Mapping):
        return rebuild_mapping(output, {**output, "loss": loss})
    if isinstance(output, (tuple, list)):
        return rebuild_sequence(output, [loss, *output[1:]])
    return loss


def map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Return ``output`` with ``function`` applied to each of its tensors."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, Mapping):
        return rebuild_mapping(output, {key: map_tensors(function, value) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return rebuild_sequence(output, [map_tensors(function, value) for value in output])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output)]
        return dataclasses.replace(output, **{name: map_tensors(function, getattr(output, name)) for name in names})
    return output


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor may carry a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def differentiable(output: Any) -> list[Tensor]:
    """Return the tensors of ``output`` that carry a gradient, in a fixed order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            found.append(tensor)
        return tensor

    map_tensors(note, output)
    return found


def guarded(output: Any, message: str, which: Sequence[bool] | None = None) -> Any:
    """Return a detached ``output`` such that whoever back-propagates through it is told ``message``.

    Args:
        output: What a model returned.
        message: Of the error.
        which: By tensor, in a fixed order: whether it is concerned; None: those of floating point.
    """
    concerned = None if which is None else iter(which)

    def guard(tensor: Tensor) -> Tensor:
        if next(concerned) if concerned is not None else tensor.is_floating_point():
            return _Refusal.apply(_root(), tensor, message)  # type: ignore[no-untyped-call, no-any-return]
        return tensor

    return map_tensors(guard, output)


def watched(
    loss: Tensor,
    on_backward: Callable[[Tensor], bool],
    tensors: Sequence[Tensor] = (),
    gradients: Sequence[Tensor | None] = (),
) -> Tensor:
    """Return ``loss`` such that ``on_backward`` gets its gradient, and may refuse or take it, before that goes back.

    It is a function of ``tensors`` too, by which it has ``gradients``.
    """
    return _Watch.apply(loss, on_backward, gradients, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def gated(tensors: Sequence[Tensor], on_backward: Callable[[list[Tensor | None]], None]) -> list[Tensor]:
    """Return ``tensors`` as the start of a new graph; ``on_backward`` gets the gradients of all of them at once.

    What has none, because the loop does not use it, gets None. Who changes a result in place has changed the tensor.
    """
    # Of the same memory, but with counts of writes of their own: a gate counts as one, which is none to whoever has
    # saved the tensor for its backward.
    fronts = [tensor.data for tensor in tensors]
    writes = _Writes(tensors, [front.detach() for front in fronts])
    return list(_Gate.apply(_root(), on_backward, writes, *fronts))  # type: ignore[no-untyped-call]


class _Writes:
    """Writes into tensors of the same memory as others, which are told of them."""

    def __init__(self, behind: Sequence[Tensor], fronts: Sequence[Tensor]) -> None:
        self._behind = behind
        self._fronts = fronts

    def pass_on(self) -> None:
        """Count what was written as written into the others, too: they may be saved for a backward."""
        for behind, front in zip(self._behind, self._fronts, strict=True):
            if front._version > 1:  # 1: the gate itself
                torch.autograd.graph.increment_version(behind)


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: Tensor, tensor: Tensor, message: str) -> Tensor:
        ctx.message = message
        ctx.mark_dirty(tensor)  # not a view, which loops may not change in place
        return tensor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None]:
        raise SkipPipeError(ctx.message)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        on_backward: Callable[[Tensor], bool],
        gradients: Sequence[Tensor | None],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.on_backward, ctx.gradients = on_backward, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        if ctx.on_backward(scale):
            return (None,) * (3 + len(ctx.gradients))
        return scale, None, None, *(None if each is None else scale.to(each) * each for each in ctx.gradients)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, root: Tensor, on_backward: Callable[[list[Tensor | None]], None], writes: _Writes, *tensors: Tensor
    ) -> Any:
        ctx.on_backward, ctx.writes = on_backward, writes
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*tensors)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[None, ...]:
        ctx.writes.pass_on()
        ctx.on_backward(list(grad_outputs))
        return (None,) * (len(grad_outputs) + 3)


def _root() -> Tensor:
    """What makes autograd call the backward of a function whose other inputs need no gradient."""
    return torch.zeros((), requires_grad=True)


def without_caches(output: Any) -> Any:
    """Return ``output`` with nothing in the places of key-value caches, which hold parts of single microbatches."""
    if isinstance(output, Mapping):
        return rebuild_mapping(output, {key: None if is_cache(value) else value for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return rebuild_sequence(output, [None if is_cache(value) else value for value in output])
    return output


def with_closed_caches(output: Any, first: Any) -> Any:
    """Return the ``output`` of microbatches with the caches of the ``first``, which say why nobody can use them."""
    if isinstance(first, Mapping) and any(map(is_cache, first.values())):
        kept = {key: close(value, OF_MICROBATCHES) for key, value in first.items() if is_cache(value)}
        return rebuild_mapping(output, {key: kept.get(key, output.get(key)) for key in first})
    if isinstance(first, (tuple, list)) and any(map(is_cache, first)):
        pairs = zip(output, first, strict=True)
        return rebuild_sequence(output, [close(old, OF_MICROBATCHES) if is_cache(old) else new for new, old in pairs])
    return output
