"""Undo what an interrupted step has changed on the driver: buffers, and the counts of metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


def rewinder(module: nn.Module) -> Callable[[], None]:
    """Return a function that brings buffers and torchmetrics of ``module`` back to what they are now.

    Parameters need none of this: they change in the optimizer's step only. Meta tensors are the workers' own.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers() if not buffer.is_meta]
    metrics = [(part, _state_of(part)) for part in module.modules() if isinstance(part, Metric)]

    def rewind() -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for metric, (count, state) in metrics:
            metric._update_count = count
            metric._computed = None
            for name, value in state.items():
                setattr(metric, name, _copied(value))

    return rewind


def _state_of(metric: Metric) -> tuple[int, dict[str, Any]]:
    return metric._update_count, {name: _copied(getattr(metric, name)) for name in metric._defaults}


def _copied(value: Any) -> Any:  # Any: a metric's state is a tensor or a list of tensors
    return value.clone() if isinstance(value, Tensor) else list(value)
