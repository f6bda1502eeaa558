"""Lightning strategies of skippipe."""

from .config import NetworkConfig
from .skippipe import SkipPipeStrategy
from .workers import stop_workers

__all__ = ["NetworkConfig", "SkipPipeStrategy", "stop_workers"]
