"""A simulated kind of device, ``sim``: what a test without a GPU can know about a GPU.

Its memory is the host's and its kernels are those of the host, but it is as strict as CUDA: tensors of two devices do
not mix, each device has a generator of its own, and what is copied without waiting is not there at once. It counts what
is copied, waited for and kept.

``tests/device/build.py`` builds the C++ beside this file and installs the package in a folder of its own, with an entry
point in ``torch.backends``: ``import torch`` loads it in each process that has the folder on its path. So the workers
of a pipeline come by it as they come by the accelerators of others, with nothing that is for tests only.
"""

import ctypes
import sys
from pathlib import Path

NUM_DEVICES = 10
LIBRARY = Path(__file__).with_name("libsim.so")
COUNTERS = ("to_device", "to_host", "between", "syncs", "kernels", "events", "streams", "recorded")
"""What a device counts: bytes copied, waits of the host, kernels, events, streams, tensors recorded on streams."""


def load() -> None:
    """Give torch the device; called at the end of ``import torch``, and by who has torch already."""
    import torch

    if hasattr(torch, "sim"):
        return
    torch.ops.load_library(LIBRARY)
    torch.utils.rename_privateuse1_backend("sim")
    from . import device_module

    torch._register_device_module("sim", device_module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def is_loaded() -> bool:
    """Tell whether this process has the device."""
    return "torch.sim" in sys.modules


def counts(device: int) -> dict[str, int]:
    """Return what a device has counted."""
    library = _library()
    return {name: library.sim_count(number, device) for number, name in enumerate(COUNTERS)}


def reset_counts() -> None:
    """Let every device count from zero."""
    for device in range(NUM_DEVICES):
        _library().sim_reset_counts(device)


def limit_memory(device: int, num_bytes: int) -> None:
    """Give a device no more memory than this."""
    _library().sim_limit_memory(device, ctypes.c_size_t(num_bytes))


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.sim_count.restype = ctypes.c_int64
    return library
