"""The random state of the user's code, and that of a step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ...engine.device import HOST, random_states, set_random_states


class RandomStates:
    """The random states of torch, numpy and Python, as they are now.

    Args:
        device: Whose state counts beside the host's.
    """

    def __init__(self, device: torch.device = HOST) -> None:
        self._device = device
        self._torch = random_states(device)
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()  # Any: numpy's own

    def set(self) -> None:
        """Put them back."""
        set_random_states(self._device, self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)

    def are_drawn_from(self) -> bool:
        """Whether somebody has drawn by numpy's or Python's global functions since."""
        return not self._is_alike_beside_torch(RandomStates(self._device))

    def are_those(self, other: RandomStates) -> bool:
        """Whether the same would be drawn from both."""
        return all(map(torch.equal, self._torch, other._torch)) and self._is_alike_beside_torch(other)

    def _is_alike_beside_torch(self, other: RandomStates) -> bool:
        (_, array, position, *_), (_, others, at, *_) = self._numpy, other._numpy
        return self._python == other._python and position == at and np.array_equal(array, others)
