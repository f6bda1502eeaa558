"""The random state of the user's code, and that of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_states(device: torch.device) -> list[Tensor]:
    """Return the random state of the host, and of ``device`` if it has its own."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Put back what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


class private_random_state:
    """Leaves the random state of the user's code as it was: the step seeds its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._states = random_states(self._device)

    def __exit__(self, *_: object) -> None:
        set_random_states(self._device, self._states)
