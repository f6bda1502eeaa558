"""Train a deep model over unequal, unreliable machines without touching its LightningModule.

Importing this package registers the strategy under the name ``"skippipe"``; the class is
:class:`skippipe_plugin.strategies.SkipPipeStrategy`. Plain torch loops use :class:`TorchPipeline`. What goes wrong at
run time is a :class:`SkipPipeError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._registration import register_when_lightning_is_there
from .engine.errors import SkipPipeError
from .late import late_names

if TYPE_CHECKING:
    from .driver.recovery.policy import RecoveryPolicy
    from .job.network import NetworkConfig
    from .model.config import PathConfig
    from .model.loop_config import SkipPipeConfig
    from .model.plain import TorchPipeline
    from .moe import MoEConfig

__all__ = [
    "MoEConfig",
    "NetworkConfig",
    "PathConfig",
    "RecoveryPolicy",
    "SkipPipeConfig",
    "SkipPipeError",
    "TorchPipeline",
]

_LATE = {
    "MoEConfig": "moe",
    "NetworkConfig": "job.network",
    "PathConfig": "model.config",
    "RecoveryPolicy": "driver.recovery.policy",
    "SkipPipeConfig": "model.loop_config",
    "TorchPipeline": "model.plain",
}
"""Where what takes seconds to import is: workers and the command line do without."""


__getattr__ = late_names(__name__, _LATE)


register_when_lightning_is_there()
