"""The simulated device for Lightning: ``Trainer(accelerator="sim")``, as a third party's accelerator comes."""

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override


class SimAccelerator(Accelerator):
    """One or more of the simulated devices."""

    @override
    def setup_device(self, device: torch.device) -> None:
        torch.accelerator.set_device_index(device)

    @override
    def teardown(self) -> None:
        torch.accelerator.empty_cache()

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return torch.accelerator.memory_stats(device)

    @staticmethod
    @override
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices))) if isinstance(devices, int | str) else list(devices)

    @staticmethod
    @override
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("sim", index) for index in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return torch.accelerator.device_count()

    @staticmethod
    @override
    def is_available() -> bool:
        return True

    @staticmethod
    @override
    def name() -> str:
        return "sim"


def register() -> None:
    """Let Trainers know the name."""
    if "sim" not in AcceleratorRegistry:
        AcceleratorRegistry.register("sim", SimAccelerator, description="Simulated devices")


def one_process() -> dict[str, Any]:
    """Return what a Trainer with one device must be told besides: Lightning would take the CPU."""
    return {"strategy": SingleDeviceStrategy(torch.device("sim", 0))}


def mixed(precision: Any) -> dict[str, Any]:
    """Return the precision as an argument of a Trainer; Lightning would take CUDA's autocast."""
    if precision in ("16-mixed", "bf16-mixed"):
        return {"plugins": MixedPrecision(precision, device="sim")}
    return {} if precision is None else {"precision": precision}
