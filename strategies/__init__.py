"""Lightning strategies of skippipe."""

from .config import NetworkConfig
from .job import stop_workers
from .skippipe import SkipPipeStrategy

__all__ = ["NetworkConfig", "SkipPipeStrategy", "stop_workers"]
