"""Stages out of blocks that a worker keeps and blocks that come from others, with all that belongs to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..engine.block_states import BlockStates, put_attributes
from ..engine.classes import check_fingerprints
from ..engine.compilation import Compilation
from ..engine.control.commands import Arrange
from ..engine.gradients import GradientWindow
from ..engine.handover import allocate, unpack_blocks, unpack_tensors
from ..engine.parcel import Parcel
from ..engine.stage import Stage
from ..engine.wire import block_tensors, decode_optimizer_state
from .copies import SharedCopies

if TYPE_CHECKING:
    from .holdings import Holdings


def arrange(holdings: Holdings, order: Arrange, parcel: Parcel, device: torch.device) -> None:
    """Hold the stages that the driver names from now on; doing it twice changes nothing.

    Kept blocks stay as they are: weights, buffers, accumulated gradients, optimizer state. What comes for the others
    replaces everything.

    Args:
        holdings: What is held so far.
        order: The driver's.
        parcel: What comes.
        device: Where the blocks live.
    """
    arrived = unpack_blocks(*parcel.structure, device=device)
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
    Compilation.unpack(order.compile).compile(arrived)
    holdings.window = GradientWindow([p for stage in holdings.stages.values() for p in stage.parameters()])
    holdings.copies = SharedCopies()  # the driver sends them in each generation
    holdings.states = BlockStates(holdings.stages)
    if not kept:
        holdings.forget_step()  # one of an earlier run, whose gradients are not those that come
    holdings.stand = holdings.whole = order.stand
    holdings.norms = dict(order.norms)
    holdings.estimates = (holdings.estimates & kept) | set(order.estimates)
    _fill(arrived, parcel)
    put_attributes(arrived, unpack_tensors(*parcel.attributes), device)
    if parcel.plan is not None:
        holdings.build_optimizer(parcel.plan)
        holdings.load_optimizer_state(state | decode_optimizer_state(*parcel.optimizer))


def _fill(blocks: dict[int, nn.Module], parcel: Parcel) -> None:
    tensors = block_tensors(blocks)
    with torch.no_grad():
        for name, tensor in unpack_tensors(*parcel.weights).items():
            tensors[name].copy_(tensor)
        for name, tensor in unpack_tensors(*parcel.gradients).items():
            tensors[name].grad = tensor.to(tensors[name].device)
