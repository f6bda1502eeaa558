"""Train a deep model over unequal, unreliable machines without touching its LightningModule.

Importing this package registers the strategy under the name ``"skippipe"``; the class is
:class:`skippipe_plugin.strategies.SkipPipeStrategy`. What goes wrong at run time is a :class:`SkipPipeError`.
"""

from ._registration import register_when_lightning_is_there
from .engine.errors import SkipPipeError

__all__ = ["SkipPipeError"]

register_when_lightning_is_there()
