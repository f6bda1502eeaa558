"""Take back what the user's code has changed on the driver, before it runs once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .contents import undo_changes
from .held import Held
from .randomness import RandomStates
from .rewind import rewinder


def undo_all(
    module: nn.Module,
    device: torch.device,
    batch: Any,  # Any: a batch of the user's
    others: Mapping[str, Any] | None = None,
) -> Callable[[], None]:
    """Return a function that brings back all that the user's code may change: see :class:`~.held.Held`.

    The batch and all random states are brought back, too.

    Args:
        module: Whose code runs.
        device: The driver's.
        batch: What it runs with.
        others: By name, what else the code can reach and is looked into.
    """
    rewind, draws, unchange = rewinder(module), RandomStates(device), undo_changes(batch)
    held = Held(module, others or {}, most_copied=0)

    def undo() -> None:
        held.restore()
        rewind()
        unchange()
        draws.set()

    return undo
