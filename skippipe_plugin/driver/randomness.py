"""The random state of the user's code, and that of a step."""

from __future__ import annotations

import torch


class private_random_state:
    """Leaves the random state of the user's code as it was: the step seeds its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._host = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._host)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
