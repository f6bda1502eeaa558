"""Switches of a whole process that change what blocks compute: read on the driver, set where the blocks are."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ProcessSwitches:
    """What user code may have switched for its process."""

    anomaly: tuple[bool, bool]
    """Whether autograd looks for anomalies, and for NaN."""
    deterministic: tuple[bool, bool]
    """Whether algorithms are deterministic, and whether those that are not only warn."""
    matmul_precision: str
    default_dtype: torch.dtype
    attention: tuple[bool, bool, bool]
    """Which kernels of attention are on: flash, memory-efficient, plain."""
    encoder_fast_path: bool

    @classmethod
    def current(cls) -> ProcessSwitches:
        """Read those of this process."""
        return cls(
            (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            (
                torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
                torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
                torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
            ),
            torch.backends.mha.get_fastpath_enabled(),
        )

    def set(self) -> None:
        """Let this process have them, for what follows."""
        torch.autograd.set_detect_anomaly(*self.anomaly)
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_default_dtype(self.default_dtype)
        flash, memory_efficient, plain = self.attention
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(memory_efficient)
        torch.backends.cuda.enable_math_sdp(plain)
        torch.backends.mha.set_fastpath_enabled(self.encoder_fast_path)
