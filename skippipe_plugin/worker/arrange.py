"""Stages out of blocks that a worker keeps and blocks that come from others, with all that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from ..engine.channel import ChannelError
from ..engine.classes import check_fingerprints
from ..engine.control.commands import Arrange
from ..engine.gradients import GradientWindow
from ..engine.handover import allocate, unpack_blocks, unpack_tensors
from ..engine.parcel import Part
from ..engine.stage import Stage
from ..engine.wire import block_tensors, decode_optimizer_state
from .buffers import BlockBuffers

if TYPE_CHECKING:
    from .holdings import Holdings


_NEEDED: Final = frozenset({"structure", "weights", "gradients", "optimizer", "records"})


def arrange(holdings: Holdings, order: Arrange, parts: Mapping[str, Part], device: torch.device) -> None:
    """Hold the stages that the driver names from now on; doing it twice changes nothing.

    Kept blocks stay as they are: weights, buffers, accumulated gradients, optimizer state. What comes for the others
    replaces everything.

    Args:
        holdings: What is held so far.
        order: The driver's.
        parts: What comes: ``structure``, ``weights``, ``gradients``, ``optimizer`` (its state), ``plan`` (to build it).
        device: Where the blocks live.

    Raises:
        ChannelError: A part is missing; nothing has changed.
    """
    absent = _NEEDED - parts.keys()
    if absent:
        raise ChannelError(f"the message 'Arrange' lacks the parts {sorted(absent)}")
    arrived = unpack_blocks(*parts["structure"])
    check_fingerprints(order.classes)
    for block in arrived.values():
        allocate(block, device)
    kept = set(order.keep)
    modules = {index: block for index, block in holdings.blocks().items() if index in kept} | arrived
    state = {key: value for key, value in holdings.optimizer_state().items() if key[0] in kept}
    holdings.stages = {}
    holdings.experts.forget(order.overlap)
    for stage, blocks, experts in order.stages:
        own = {block: modules[block] for block in blocks}
        holdings.experts.cut(stage, own, experts)
        holdings.stages[stage] = Stage(stage, own, device)
    if order.compile is not None:
        for block in arrived.values():
            block.compile(**order.compile)
    holdings.window = GradientWindow([p for stage in holdings.stages.values() for p in stage.parameters()])
    holdings.buffers = BlockBuffers(modules[block] for _, blocks, _ in order.stages for block in blocks)
    if not kept:
        holdings.forget_step()  # one of an earlier run, whose gradients are not those that come
    holdings.norms = dict(order.norms)
    holdings.estimates = (holdings.estimates & kept) | set(order.estimates)
    _fill(arrived, parts)
    if "plan" in parts:
        holdings.build_optimizer(parts["plan"][1][0])
        holdings.load_optimizer_state(state | decode_optimizer_state(*parts["optimizer"]))


def _fill(blocks: dict[int, nn.Module], parts: Mapping[str, Part]) -> None:
    tensors = block_tensors(blocks)
    with torch.no_grad():
        for what in ("weights", "gradients"):
            for name, tensor in unpack_tensors(*parts[what]).items():
                if what == "weights":
                    tensors[name].copy_(tensor)
                else:
                    tensors[name].grad = tensor.to(tensors[name].device)
