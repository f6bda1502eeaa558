"""``nn.TransformerEncoder`` in evaluation: with a padding mask it computes on nested tensors, and padding becomes zero.

Its blocks are called with the ordinary tensors in a pipeline, since nested ones cannot travel. What stands at real
positions is the same; the zeros are put in afterwards, where one process would have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def keep_padding_empty(model: nn.Module, blocks: Sequence[nn.Module]) -> list[Callable[[], None]]:
    """Let the encoders of ``model`` whose layers are among ``blocks`` return what they would in one process.

    Returns:
        What undoes it.
    """
    encoders = [part for part in model.modules() if isinstance(part, nn.TransformerEncoder)]
    inside = [encoder for encoder in encoders if not set(blocks).isdisjoint(encoder.layers)]
    return [_replace_forward(encoder) for encoder in inside if getattr(encoder, "use_nested_tensor", False)]


def _replace_forward(encoder: nn.TransformerEncoder) -> Callable[[], None]:
    original, had = encoder.forward, encoder.__dict__.get("forward")

    def forward(
        src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: Any = None
    ) -> Tensor:
        result: Tensor = original(src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or not _goes_nested(encoder, src, src_key_padding_mask):
            return result
        empty = torch.zeros_like(result)
        empty = empty if encoder.norm is None else encoder.norm(empty)
        return torch.where(src_key_padding_mask.logical_not()[..., None], result, empty)

    def undo() -> None:
        encoder.__dict__.pop("forward", None)
        if had is not None:
            encoder.__dict__["forward"] = had

    encoder.__dict__["forward"] = forward
    return undo


def _goes_nested(encoder: nn.TransformerEncoder, src: Tensor, padding: Tensor) -> bool:
    """Whether one process would take torch's fast path; its own conditions, those on the layers' form aside."""
    if encoder.layers[0].training or src.dim() != 3 or not torch.backends.mha.get_fastpath_enabled():
        return False
    if torch.is_autocast_enabled(src.device.type):
        return False
    if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in encoder.layers[0].parameters())):
        return False
    keep = padding if padding.dtype == torch.bool else padding != 0
    return not encoder.mask_check or bool(torch._nested_tensor_from_mask_left_aligned(src, keep.logical_not()))
