"""Train a deep model over unequal, unreliable machines without touching its LightningModule.

Importing this package registers the strategy under the name ``"skippipe"``; the class is
:class:`skippipe_plugin.strategies.SkipPipeStrategy`.
"""

from ._registration import register_when_lightning_is_there

register_when_lightning_is_there()
