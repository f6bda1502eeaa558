"""Lightning strategies of skippipe."""

from ..job.job import stop_workers
from ..job.network import NetworkConfig
from ..model.config import PathConfig
from .skippipe import SkipPipeStrategy

__all__ = ["NetworkConfig", "PathConfig", "SkipPipeStrategy", "stop_workers"]
