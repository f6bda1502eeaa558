"""Pipelines for training loops of Hugging Face accelerate (needs the extra ``accelerate``)."""

try:
    import accelerate as _accelerate  # noqa: F401
except ImportError as error:  # pragma: no cover - depends on the environment
    raise ImportError(
        "skippipe_plugin.accelerate needs Hugging Face accelerate: pip install 'skippipe-plugin[accelerate]'"
    ) from error

from ..driver.recovery.policy import RecoveryPolicy
from ..job.network import NetworkConfig
from ..model.config import PathConfig
from ..model.loop_config import SkipPipeConfig
from .accelerator import SkipPipeAccelerator
from .pipe import SkipPipe

__all__ = ["NetworkConfig", "PathConfig", "RecoveryPolicy", "SkipPipe", "SkipPipeAccelerator", "SkipPipeConfig"]
