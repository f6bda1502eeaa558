"""What users of Lightning, of accelerate and of plain loops call the same things, for messages to all of them."""

from __future__ import annotations

from typing import Final

BEFORE_HANDOVER: Final = "before fit (in a loop of your own: before accelerator.prepare or TorchPipeline)"
"""When blocks may still be changed in any way."""
IN_A_STEP: Final = "in training_step (in a loop of your own: by calling the whole model that the pipeline was given)"
"""Where blocks are called so that gradients come back from them."""
RECOVERY: Final = "StageRecovery (in a loop of your own: recovery=RecoveryPolicy())"
"""What replaces lost workers."""
