"""``self.log`` inside a microbatched step: collected, averaged over the microbatches, and logged once.

Lightning keeps the last value that a step logs. A step that runs once per microbatch must log what the whole batch
would have: the mean weighted by microbatch size, or the sum, maximum or minimum when ``reduce_fx`` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from ..driver.capture.suspend import current_thread

_Entry = tuple[int, Any, dict[str, Any]]  # Any: what self.log accepts


class AveragedLog:
    """Stands in for ``module.log`` while a step runs."""

    def __init__(self, module: LightningModule, sizes: Sequence[int]) -> None:
        self._module = module
        self._sizes = sizes
        self._entries: dict[str, list[_Entry]] = {}
        self._microbatch = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Collect instead of logging; log the averages at the end, unless the step failed."""
        self._module.__dict__["log"] = self._collect
        try:
            yield
        finally:
            del self._module.__dict__["log"]
        for name, entries in self._entries.items():
            if entries:
                self._replay(name, entries)

    def within(self, microbatch: int, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``function`` such that what it logs counts for ``microbatch``, however it is interleaved."""

        def run() -> Any:
            thread = current_thread()
            assert thread is not None
            thread.label = microbatch
            self._forget(microbatch)  # an attempt that was given up may have logged already
            return function()

        return run

    def _collect(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        names = ("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx")
        kwargs |= dict(zip(names, args, strict=False))
        thread = current_thread()
        microbatch = thread.label if thread is not None else 0
        if isinstance(value, Metric):
            kwargs["_forward"] = value._forward_cache
        elif isinstance(value, Tensor):
            value = value.detach()
        self._entries.setdefault(name, []).append((microbatch, value, kwargs))

    def _forget(self, microbatch: int) -> None:
        for name, entries in list(self._entries.items()):
            self._entries[name] = [entry for entry in entries if entry[0] != microbatch]

    def _replay(self, name: str, entries: Sequence[_Entry]) -> None:
        _, value, kwargs = entries[0]
        weights = [self._sizes[microbatch] for microbatch, _, _ in entries]
        explicit = [size for entry in entries if (size := entry[2].get("batch_size")) is not None]
        if len(explicit) == len(entries):
            kwargs["batch_size"] = sum(explicit)
            weights = explicit
        forwards: list[Any] = [entry[2].pop("_forward", None) for entry in entries]  # Any: a metric's last value
        if isinstance(value, Metric):
            if all(isinstance(forward, Tensor) for forward in forwards):
                value.__dict__["_forward_cache"] = _combine(forwards, weights, "mean")
        else:
            value = _combine([entry[1] for entry in entries], weights, kwargs.get("reduce_fx", "mean"))
        self._module.log(name, value, **kwargs)


def _combine(values: Sequence[Any], weights: Sequence[int], reduce_fx: Any) -> Tensor:
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32).squeeze() for value in values])
    if reduce_fx in ("sum", torch.sum):
        return stacked.sum()
    if reduce_fx in ("max", torch.max):
        return stacked.max()
    if reduce_fx in ("min", torch.min):
        return stacked.min()
    return (stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)).sum() / sum(weights)
