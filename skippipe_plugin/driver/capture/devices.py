"""Where the driver's part of a model lives."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from ...engine.handover import materialize


def move_around(module: nn.Module, blocks: Collection[nn.Module], device: torch.device) -> None:
    """Move ``module`` to ``device``, leaving ``blocks`` inside it where they are.

    A part without blocks is moved as its class wants to be moved (metrics, for one, have more than parameters), and
    made there when it was built on the meta device.
    """
    if module in blocks:
        return
    if not any(part in blocks for part in module.modules()):
        materialize(module, device)
        return
    module._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
    for child in module.children():
        move_around(child, blocks, device)
