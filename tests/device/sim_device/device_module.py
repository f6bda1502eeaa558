"""``torch.sim``: what torch and its users ask of the module of a device type."""

from typing import Any

import torch
from torch import Tensor
from torch.accelerator import (  # noqa: F401 - names of the module
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
    synchronize,
)

from . import NUM_DEVICES

default_generators = tuple(torch.ops.sim.generator(index) for index in range(NUM_DEVICES))
Device = torch.device | str | int | None
Event, Stream = torch.Event, torch.Stream
_initialized = True  # torch.utils.checkpoint asks


def init() -> None:
    """Do nothing: the devices are there."""


def is_initialized() -> bool:
    return True


def is_available() -> bool:
    return True


def device_count() -> int:
    return len(default_generators)


def current_device() -> int:
    return torch.accelerator.current_device_index()


def set_device(device: Device) -> None:
    torch.accelerator.set_device_index(_index(device))


class device:
    """Make a device the current one for a while."""

    def __init__(self, device: Device) -> None:
        self._index, self._before = _index(device), -1

    def __enter__(self) -> None:
        self._before = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(self._index)

    def __exit__(self, *_: Any) -> None:
        torch.accelerator.set_device_index(self._before)


def current_stream(device: Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def manual_seed(seed: int) -> None:
    default_generators[current_device()].manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for generator in default_generators:
        generator.manual_seed(int(seed))


def initial_seed() -> int:
    return default_generators[current_device()].initial_seed()


def get_rng_state(device: Device = "sim") -> Tensor:
    return default_generators[_index(device)].get_state()


def set_rng_state(new_state: Tensor, device: Device = "sim") -> None:
    default_generators[_index(device)].set_state(new_state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def _index(device: Device) -> int:
    """Return the number of a device; the current one where it has none."""
    if isinstance(device, int):
        return device
    named = torch.device("sim" if device is None else device)
    if named.type != "sim":
        raise ValueError(f"Expected a sim device, but got {named}")
    return current_device() if named.index is None else named.index
