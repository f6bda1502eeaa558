"""Rarer settings of the strategy, as small frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Where the driver and its workers meet."""

    host: str = "127.0.0.1"
    """The address the driver listens on and the groups bind to; workers on other hosts must be able to reach it."""
    port: int = 0
    """The port of the control channels; 0 takes any free one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} is not a port; choose 0 (any free one) to 65535")
