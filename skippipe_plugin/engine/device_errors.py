"""Errors of devices and of memory: they say nothing of the code that ran, and stay what they are on their way."""

from __future__ import annotations

from typing import Final

import torch

_TYPES: Final = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
_WORDS: Final = (
    "out of memory",
    "can't allocate memory",  # the host's, of torch
    "CUDA error",
    "HIP error",
    "XPU error",
    "cuDNN error",
    "CUBLAS_STATUS_",
)
_LASTING: Final = (
    "device-side assert",
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ECC error",
    "unrecoverable",
    "context is destroyed",
)
"""After these CUDA refuses everything, until the process ends."""


def is_of_device(error: BaseException) -> bool:
    """Whether a device failed, or memory was short, whatever it was that ran."""
    return isinstance(error, _TYPES) or (isinstance(error, RuntimeError) and _says(error, _WORDS + _LASTING))


def is_lasting(error: BaseException) -> bool:
    """Whether the process that has met this error can use its device no more."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.AcceleratorError):  # one that memory was short for is an OutOfMemoryError
            return not _says(seen, ("out of memory",))
        if isinstance(seen, RuntimeError) and _says(seen, _LASTING):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _says(error: BaseException, any_of: tuple[str, ...]) -> bool:
    text = str(error)
    return any(words in text for words in any_of)
