"""Gives memory back that nothing in this process uses any more."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch


def give_back(device: torch.device) -> None:
    """Let other processes have what was freed: torch keeps a device's memory, and the C library the host's."""
    gc.collect()  # what autograd and modules hold goes round in circles
    empty_cache = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; others do without
        if trim is not None:
            trim(0)
