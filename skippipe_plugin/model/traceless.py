"""Run user code for a look at what comes out of it, and leave no trace: attributes, buffers, metrics, random states.

Global names that the code reads are brought back, too, and what stands in its classes. What a run has changed of them
can be read before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from ..driver.capture.held import Held
from ..driver.capture.randomness import RandomStates
from ..driver.capture.rewind import rewinder
from ..driver.capture.switches import Snapshot
from ..sharing import parameters_outside

_UNEVEN: Final = 0.1
_LOOKED_AT: Final = 64


@dataclass(frozen=True, slots=True)
class Untouched:
    """What user code finds when it runs for a look."""

    restore: Callable[[], None]
    """Brings everything back."""
    changes: Callable[[], dict[str, Any]]
    """Returns, by name, what attributes, buffers and global names hold since then that they did not hold before."""
    has_drawn: Callable[[], bool]
    """Returns whether numbers were drawn since then that numpy or Python makes; torch's are looked at one by one."""
    changed_in_batch: Callable[[], str] = str
    """Names what the batch holds since then that it did not hold before; nothing where there is none."""


@contextmanager
def untouched(
    module: nn.Module,
    device: torch.device,
    others: Mapping[str, Any] | None = None,  # Any: whatever a step can reach
) -> Iterator[Untouched]:
    """Bring everything back at the end, and whenever what this gives is asked to.

    Args:
        module: Whose code runs.
        device: The driver's.
        others: By name, what else the code can reach and is looked into.
    """
    states, rewind, held = RandomStates(device), rewinder(module), Held(module, others or {})
    before = Snapshot(stacks=False)

    def restore() -> None:
        before.take_back()
        held.restore()
        rewind()
        states.set()

    try:
        yield Untouched(restore, held.changes, states.are_drawn_from)
    finally:
        restore()
        held.release()


@contextmanager
def uneven(module: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let no parameter of ``module`` have one value everywhere, those of ``blocks`` aside; bring all back at the end.

    A head that starts as zeros says of every label the same, so that any mean of the losses is like any other.
    """
    noise, even = torch.Generator().manual_seed(0), []
    for parameter in parameters_outside(module, [*blocks]):
        if _is_even(parameter):
            even.append((parameter, parameter.detach().reshape(-1)[0].item()))
            drawn = torch.rand(parameter.shape, generator=noise, dtype=torch.float32) * _UNEVEN
            parameter.data.add_(drawn.to(parameter))
    try:
        yield
    finally:
        for parameter, value in even:
            parameter.data.fill_(value)


def _is_even(parameter: nn.Parameter) -> bool:
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.is_floating_point():
        return False
    values = parameter.detach()
    if values.layout is not torch.strided or values.numel() < 2:
        return False
    first = values.reshape(-1)[:_LOOKED_AT]
    return bool((first == first[0]).all()) and bool((values == first[0]).all())
