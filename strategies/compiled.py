"""LightningModules that were compiled as a whole, which Lightning does by replacing their methods."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import to_uncompiled


def uncompile(module: LightningModule) -> Any:  # Any: dynamo's context
    """Undo ``torch.compile(module)``; return the settings it was compiled with, None when it was not."""
    if module._compiler_ctx is None:
        return None
    context = module._compiler_ctx["dynamo_ctx"]
    to_uncompiled(module)
    return context
