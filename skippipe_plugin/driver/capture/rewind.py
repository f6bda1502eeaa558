"""Undo what an interrupted step has changed on the driver: buffers, and the counts of metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from .remote import is_remote


def rewinder(module: nn.Module) -> Callable[[], None]:
    """Return a function that brings buffers and torchmetrics of ``module`` back to what they are now.

    Parameters need none of this: they change in the optimizer's step only. Remote ones are the workers' own.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers() if not is_remote(buffer)]
    metrics = metric_states(module)

    def rewind() -> None:
        for buffer, value in buffers:
            buffer.data.copy_(value)  # by .data: counted as a write, it would break graphs that have used the buffer
        set_metric_states(module, metrics)

    return rewind


MetricState = tuple[int, dict[str, Any]]  # Any: a metric's state is a tensor or a list of tensors


def metric_states(module: nn.Module) -> dict[str, MetricState]:
    """Return, by name, how often each torchmetric of ``module`` was updated, and a copy of what it has counted."""
    metrics = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
    return {
        name: (metric._update_count, {key: _copied(getattr(metric, key)) for key in metric._defaults})
        for name, metric in metrics.items()
    }


def set_metric_states(module: nn.Module, states: Mapping[str, MetricState]) -> None:
    """Overwrite what :func:`metric_states` returns, and what has come to the host since; see torchmetrics for lists."""
    for name, (count, state) in states.items():
        metric = cast("Metric", module.get_submodule(name))
        metric._update_count = count
        metric._computed = None
        for key, value in state.items():
            counts_here = isinstance(value, Tensor) or not metric.compute_on_cpu
            setattr(metric, key, _copied(_on(metric.device, value) if counts_here else value))


def _on(device: torch.device, value: Any) -> Any:  # Any: a metric's state is a tensor or a list of tensors
    return value.to(device) if isinstance(value, Tensor) else [each.to(device) for each in value]


def _copied(value: Any) -> Any:  # Any: a metric's state is a tensor or a list of tensors
    return value.clone() if isinstance(value, Tensor) else list(value)
