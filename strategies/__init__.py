"""Lightning strategies of skippipe."""

from .config import NetworkConfig, PathConfig
from .job import stop_workers
from .skippipe import SkipPipeStrategy

__all__ = ["NetworkConfig", "PathConfig", "SkipPipeStrategy", "stop_workers"]
