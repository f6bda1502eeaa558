"""Take back what the user's code has changed on the driver, before it runs once more."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .contents import undo_changes
from .held import Held
from .randomness import random_states, set_random_states
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
    rewind, draws, unchange = rewinder(module), undo_draws(device), undo_changes(batch)
    held = Held(module, others or {}, most_copied=0)

    def undo() -> None:
        held.restore()
        rewind()
        unchange()
        draws()

    return undo


def undo_draws(device: torch.device) -> Callable[[], None]:
    """Return a function that sets the random states of torch, Python and numpy to what they are now."""
    states, python = random_states(device), random.getstate()
    numpy = sys.modules.get("numpy")
    arrays = numpy.random.get_state() if numpy is not None else None

    def undo() -> None:
        set_random_states(device, states)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)

    return undo
