"""Weights whose values are on a worker: on the driver they keep their names and shapes, and say where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import SkipPipeError
from ...engine.handover import swap_memory


class RemoteTensor(Tensor):
    """A tensor without memory (on the meta device); what is computed from it is one too."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),  # Any: whatever the torch function takes
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.equal:  # finetuning callbacks of Lightning look parameters up by value
            return args[0] is args[1]
        try:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        except SkipPipeError:
            raise
        except RuntimeError as error:
            raise SkipPipeError(
                f"{getattr(func, '__name__', func)}() needs the values of weights that are on a pipeline's worker, "
                "but the driver has only their names and shapes; do it after the run or with a checkpoint, or leave "
                f"the blocks out (torch says: {str(error).splitlines()[0]})"
            ) from error


def detach(tensor: Tensor) -> None:
    """Replace a tensor's memory by none, keeping the object's identity."""
    swap_memory(tensor, torch.empty_like(tensor, device="meta", requires_grad=False).as_subclass(RemoteTensor))


def reattach(tensor: Tensor, value: Tensor) -> None:
    """Give a detached tensor memory again."""
    swap_memory(tensor, value.detach())
