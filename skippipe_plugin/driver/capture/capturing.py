"""Outputs of every layer that transformers' models are asked for (``output_hidden_states=True``): hooks keep them."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ...engine.errors import SkipPipeError
from ...engine.taps import CAPTURING, is_capturing


def _captured() -> list[str]:
    """Name what transformers' models are asked to keep of their layers."""
    module = sys.modules.get(CAPTURING)
    collector = module._active_collector.get() if module is not None else None
    return [key for key in collector or () if not key.startswith("_")]


def refuse_captured_parts(name: str) -> None:
    """What modules inside of layers compute is on the workers, and is not sent back."""
    asked = [key for key in _captured() if key != "hidden_states"]
    if asked:
        raise SkipPipeError(
            f"the model was asked for {', '.join(sorted(set(asked)))} of every layer, but the layers from {name} on "
            "are on the workers and only what they return comes back; do not ask for them, or train without the "
            "pipeline"
        )


def shown_to_capturing(block: nn.Module, args: tuple[Any, ...], returned: Any) -> Any:
    """Let transformers keep what a block returns, if its model was asked for the hidden states of every layer."""
    if _captured():
        for hook in list(block._forward_hooks.values()):
            if is_capturing(hook):
                hook(block, args, returned)
    return returned
