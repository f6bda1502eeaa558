"""Lightning strategies of skippipe."""

from ..integration.config import NetworkConfig, PathConfig
from ..integration.job import stop_workers
from .skippipe import SkipPipeStrategy

__all__ = ["NetworkConfig", "PathConfig", "SkipPipeStrategy", "stop_workers"]
