"""What a process computes on: the host, or a device of the accelerator that torch finds there.

No other module of the engine or of the driver names a kind of device: ``torch.accelerator`` and
``torch.get_device_module`` know all kinds that are registered with torch (CUDA, ROCm, XPU, MPS, NPU, HPU, ...).
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import SkipPipeError

HOST: Final = torch.device("cpu")
_VISIBLE: Final = (
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    *("ZE_AFFINITY_MASK", "ASCEND_RT_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES", "TPU_VISIBLE_CHIPS"),
)
"""What schedulers limit a process with to some devices of its host, which it then counts from 0."""
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is, and what it may compute on there."""

    host: str = ""
    """Names the machine (or container); processes of the same name see the same devices."""
    visible: str = ""
    """Which of the machine's devices a scheduler has left to the process; others count theirs anew, from 0."""
    kind: str = ""
    """The type of the accelerator; empty where there is none."""
    num_devices: int = 0
    """How many of these it sees."""
    device: str = ""
    """What it is to compute on, chosen where it was started; empty: the driver chooses."""


NOWHERE: Final = Place()


def own_place(device: str = "") -> Place:
    """Say where this process is; no accelerator is started for it."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    visible = " ".join(f"{name}={os.environ[name]}" for name in _VISIBLE if name in os.environ)
    kind = torch.accelerator.current_accelerator(check_available=True)
    num_devices = torch.accelerator.device_count() if kind is not None else 0
    return Place(f"{socket.gethostname()} {boot}", visible, kind.type if kind is not None else "", num_devices, device)


def make_current(device: torch.device) -> None:
    """Let the calling thread compute on ``device`` wherever its code names a kind of device without a number.

    Raises:
        SkipPipeError: This process has no such device.
    """
    if device.type == "cpu":
        return
    place = own_place()
    if device.type != place.kind or (device.index or 0) >= place.num_devices:
        has = f"{place.num_devices} of {place.kind}" if place.kind else "no accelerator"
        raise SkipPipeError(f"this process is to compute on {device}, but {socket.gethostname()} has {has}")
    torch.accelerator.set_device_index(device.index or 0)


def current() -> torch.device:
    """Return the device on which the calling thread computes where none is named; the host without an accelerator."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return HOST if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def all_devices() -> list[torch.device]:
    """Return the devices that this process sees, beside the host."""
    place = own_place()
    return [torch.device(place.kind, index) for index in range(place.num_devices)]


def synchronize(device: torch.device) -> None:
    """Wait until all that was started on ``device`` is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def for_gloo(tensor: Tensor) -> Tensor:
    """Return ``tensor`` where gloo reads it, which knows few kinds of devices: itself, or a copy on the host."""
    known = dist.distributed_c10d.Backend.backend_capability["gloo"]
    return tensor if tensor.device.type in known else tensor.cpu()


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory is free on ``device``; None where that is not told."""
    if device.type == "cpu":
        return None
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except (NotImplementedError, RuntimeError):
        return None
    return free


# ------------------------------------------------------------------------ randomness


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the host and of ``device``."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        _seeder(device if device.index is not None else current())(seed)


def random_states(device: torch.device) -> list[Tensor]:
    """Return the state of the host's generator, and of that of ``device`` if it has its own."""
    if device.type == "cpu":
        return [torch.get_rng_state()]
    module = torch.get_device_module(device)
    return [torch.get_rng_state(), module.get_rng_state(*_which(device))]


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Put back what :func:`random_states` returned."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, *_which(device))


class kept_random_states:
    """Leaves the generators of the host and of ``device`` as they are found."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._states = random_states(self._device)

    def __exit__(self, *_: object) -> None:
        set_random_states(self._device, self._states)


@functools.cache
def _seeder(device: torch.device) -> Callable[[int], Any]:
    """Return what seeds the generator of one device, and of no other; blocks are seeded at every call."""
    torch.empty(0, device=device)  # a kind of device has no generators before it is started
    module = torch.get_device_module(device)
    generators = getattr(module, "default_generators", ())
    index = device.index
    if index < len(generators):
        return generators[index].manual_seed  # type: ignore[no-any-return]
    if not hasattr(module, "manual_seed"):
        raise SkipPipeError(
            f"torch.{device.type} has no manual_seed(), so that what blocks draw on {device} (dropout) could not be "
            "the same in every layout and when a batch is repeated; train on the host, or without the pipeline"
        )

    def seed(number: int) -> None:
        with torch.accelerator.device_index(index):
            module.manual_seed(number)

    return seed


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # which has one, and is not asked which
