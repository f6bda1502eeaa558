"""What a worker holds: its stages' blocks, their gradients and their optimizer state, and nothing else of the model."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import gradients
from ..engine.block_states import BlockStates
from ..engine.channel import Buffer
from ..engine.classes import check_fingerprints
from ..engine.compilation import Compilation
from ..engine.control.answers import State
from ..engine.control.commands import Clip, Load, Merge, Overwrite, Share
from ..engine.control.values import ExpertCost, Opening, Stand, StepOrder, What
from ..engine.gradients import GradientWindow
from ..engine.handover import (
    materialize,
    pack_gradients,
    pack_tensors,
    unpack_blocks,
    unpack_gradients,
    unpack_tensors,
)
from ..engine.optimizer import ParameterKey, StageOptimizer
from ..engine.stage import Stage
from ..engine.wire import block_tensors, encode_optimizer_state, tensor_key
from .copies import Gathered, SharedCopies
from .experts import SpreadExperts


class Holdings:
    """The stages of one worker; empty until the first :meth:`load`."""

    def __init__(self) -> None:
        self.stages: dict[int, Stage] = {}
        self.experts = SpreadExperts()
        self.window = GradientWindow([])
        self.states = BlockStates()
        self.copies = SharedCopies()
        self.norms: dict[int, float] = {}
        """By stage: the L2 norm of its gradient in the last optimizer step, before the clipping of all together."""
        self.estimates: set[int] = set()
        """The blocks that were rebuilt from their neighbours and have not taken an optimizer step since."""
        self.stand = Stand()
        """The last optimizer step, where the driver numbers them."""
        self.whole = Stand()
        """The last one whose gradients were whole."""
        self._optimizer: StageOptimizer | None = None
        self._stepped = False
        """Whether the gradients have been used by an optimizer step: they can be read until the next step begins."""

    def load(self, sent: Load, device: torch.device) -> None:
        """Take over a stage."""
        torch.manual_seed(sent.seed)
        blocks = unpack_blocks(sent.blocks, sent.blobs, device=device)
        check_fingerprints(sent.classes)
        for block in blocks.values():
            materialize(block, device)
        if sent.first:
            self.experts.forget(sent.overlap)
        self.experts.cut(sent.stage, blocks, sent.experts)
        Compilation.unpack(sent.compile).compile(blocks)
        if sent.first:
            self.stages, self.norms, self._optimizer = {}, {}, None
            self.stand = self.whole = Stand()
            self.estimates = set()
            self._stepped = False
            self.copies = SharedCopies()
        self.stages[sent.stage] = Stage(sent.stage, blocks, device)
        if sent.last:
            self.window = GradientWindow([p for stage in self.stages.values() for p in stage.parameters()])
            self.states = BlockStates(self.stages)

    def forget_step(self) -> None:
        """Hold gradients that no optimizer step has used."""
        self._stepped = False

    def give_up_step(self, *, for_good: bool = False) -> None:
        """Drop what an interrupted step has computed; what it has left in the blocks only if that is ``for_good``."""
        for stage in self.stages.values():
            stage.forget()
        self.window.discard()
        if for_good:
            self.states.settle(counts=False)

    # ----------------------------------------------------------- gradients

    def begin_step(self, opening: Opening, *, may_repeat: bool = False) -> None:
        """Start a step; a training step with a new window for gradients if an optimizer step has used the last ones.

        With ``may_repeat`` what a training step leaves in the blocks is taken back unless its gradients are merged.
        """
        self.states.begin(opening.states, repeats=opening.repeats, may_repeat=may_repeat and opening.training)
        if not opening.training:
            return
        self.zero(opening.zero)
        if self._stepped:
            self._stepped = False
            self.window.zero()
        self.window.open()

    def end_step(self, skip: Collection[int]) -> Gathered:
        """End a training step, whose gradients are complete; return what the copies of the driver's have gathered.

        Args:
            skip: See :meth:`SharedCopies.gather`.
        """
        gathered = self.copies.gather(self.stages, self._tensors() if self.copies else {}, skip)
        self.window.close()
        return gathered

    def clip(self, how: Clip | StepOrder) -> None:
        """Clip what is accumulated."""
        gradients.clip(self.window.parameters, scale=how.scale, value=how.value)

    def merge(self, command: Merge) -> None:
        """Add the new gradients to the accumulated ones."""
        self.states.keep()
        self.zero(command.zero)
        for stage, scale in command.stage_scales:
            if stage in self.stages:
                gradients.scale_gradients(self.window.new_of(self.stages[stage].parameters()), scale)
        self.window.in_half.update(*(stage.in_half for stage in self.stages.values()))
        self.window.merge(command.scale)

    def zero(self, how: str) -> None:
        """Drop the accumulated gradients (``"drop"``), fill them with zeros (``"fill"``), or leave them (``""``)."""
        if how:
            self.window.zero(fill=how == "fill")

    def norm_powers(self, norm_type: float, *, stepped: bool) -> tuple[float, float]:
        """Return this worker's part of the gradients' norm, and the part of that from experts only it holds.

        With ``stepped``, of the parameters that its optimizer steps; otherwise of all.
        """
        members, spread = self.window.parameters, self.experts.parameters(self.stages)
        if stepped and self._optimizer is not None:
            known = {id(parameter) for parameter in self._optimizer.parameters()}
            members, spread = ([p for p in each if id(p) in known] for each in (members, spread))
        return gradients.norm_power(members, norm_type), gradients.norm_power(spread, norm_type)

    def unscale(self, inverse: float) -> bool | None:
        """Multiply the gradients that the optimizer steps; return whether any overflowed, None if there are none."""
        assert self._optimizer is not None, "an optimizer step before the optimizer"
        return gradients.unscale(self._optimizer.parameters(), inverse)

    def build_optimizer(self, plan: Buffer) -> None:
        """Build the optimizer that the driver describes; its state starts empty."""
        self._optimizer = StageOptimizer(pickle.loads(plan), self._named_parameters())

    def optimizer_state(self) -> dict[ParameterKey, dict[str, Any]]:
        """Return each parameter's optimizer state; tensors are not copied."""
        return self._optimizer.state() if self._optimizer else {}

    def load_optimizer_state(self, state: Mapping[ParameterKey, Mapping[str, Any]]) -> None:
        """Overwrite the optimizer's state, if there is an optimizer."""
        if self._optimizer is not None:
            self._optimizer.load_state(state)

    def step_optimizer(self, order: StepOrder, settings: Buffer) -> None:
        """Clip, step, and drop the gradients unless they are to be kept."""
        self.zero(order.zero)
        if order.keep_norms:
            powers = {number: gradients.norm_power(stage.parameters(), 2.0) for number, stage in self.stages.items()}
            self.norms = {number: power**0.5 for number, power in powers.items()}
        self.clip(order)
        assert self._optimizer is not None, "an optimizer step before the optimizer"
        factors = [factor for stage, factor in order.lr_factors if stage in self.stages]
        self._optimizer.step(settings, lr_factor=max(factors, default=1.0))
        self.estimates = set()
        self.stand = replace(self.stand, step=order.step)
        self.states.forget()
        if not order.keep:
            self._stepped = True  # what follows is a new accumulation window

    def switch_optimizer(self, method: str, settings: Buffer) -> None:
        """Call ``train`` or ``eval`` of an optimizer that has two sets of weights."""
        assert self._optimizer is not None, "a mode before the optimizer"
        self._optimizer.switch(method, settings)

    def move_experts(self, moves: Sequence[tuple[int, str, Sequence[int]]]) -> list[ExpertCost]:
        """Move experts as ordered (block, name, placement); return what those here took since the last time."""
        self.experts.move(moves, self.stages, self._optimizer)
        return self.experts.measured(self.stages, self._optimizer)

    # --------------------------------------------------------------- state

    def state(self, what: What, only: Collection[int] | None = None) -> State:
        """Return ``"weights"``, the ``"optimizer"``'s state, or accumulated ``"gradients"``, perhaps of some blocks.

        ``"last_gradients"`` are also those that an optimizer step has used; ``"standing"`` is no tensor at all.
        """
        if what == "optimizer":
            state = self.optimizer_state()
            own = {key: state[key] for key in state if only is None or key[0] in only}
            return State(*self._standing(), *encode_optimizer_state(own))
        named = self._named(what)
        if only is not None:
            named = {name: tensor for name, tensor in named.items() if tensor_key(name)[0] in only}
        return State(*self._standing(), *(pack_tensors if what == "weights" else pack_gradients)(named))

    def _standing(self) -> tuple[list[tuple[int, float]], list[int], list[tuple[int, list[int]]]]:
        """Return the norms of the last gradients, the estimates, and the blocks of stages."""
        stages = [(number, list(stage.blocks)) for number, stage in self.stages.items()]
        return list(self.norms.items()), sorted(self.estimates), stages

    def _named(self, what: What) -> dict[str, Tensor]:
        if what == "standing":
            return {}
        if what == "attributes":
            return self.states.packed_attributes()
        return self._tensors() if what == "weights" else self._gradients(used=what == "last_gradients")

    def overwrite(self, sent: Overwrite | Share) -> None:
        """Overwrite weights or gradients."""
        own = self._tensors()
        if isinstance(sent, Share):
            self.copies.overwrite(sent, own)
            return
        self.zero(sent.zero)
        for name in sent.absent:
            own[name].grad = None
        unpack = unpack_tensors if sent.what == "weights" else unpack_gradients
        with torch.no_grad():
            for name, tensor in unpack(sent.tensors, sent.blobs).items():
                if sent.what == "weights":
                    own[name].copy_(tensor)
                else:
                    own[name].grad = tensor.to(own[name].device)

    def _tensors(self) -> dict[str, Tensor]:
        return block_tensors(self.blocks())

    def _gradients(self, *, used: bool) -> dict[str, Tensor]:
        if self._stepped and not used:
            return {}
        return {name: tensor.grad for name, tensor in self._tensors().items() if tensor.grad is not None}

    def blocks(self) -> dict[int, nn.Module]:
        """Return the blocks that live here, by their numbers in the stack."""
        return {index: block for stage in self.stages.values() for index, block in stage.blocks.items()}

    def _named_parameters(self) -> dict[ParameterKey, nn.Parameter]:
        return {(block, name): p for stage in self.stages.values() for block, name, p in stage.named_parameters()}
