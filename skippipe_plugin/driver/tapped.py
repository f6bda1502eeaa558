"""What stages and the driver of a microbatch exchange beside the hidden states: what hooks see, and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..engine.call import CallSpec, Made
from ..engine.control import answers
from ..engine.control.commands import Pulled
from ..engine.handover import pack_tensors, unpack_tensors
from ..engine.stage import Stage
from ..engine.taps import TapEvent, Tapped, gradients_of, unpack_events
from ..schedule import Path
from .capture.hooks import seen
from .capture.stack_call import StackCall
from .layout import Layout
from .links import Links


@dataclass(slots=True)
class Shown:
    """What the hooks of one microbatch are to see."""

    events: list[TapEvent] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    exported: list[Tensor] = field(default_factory=list)
    """What the code after the blocks gets of what they return, in their order."""
    leaves: dict[int, list[Tensor]] = field(default_factory=dict)
    """By stage that gradients go back to: what collects them."""


class TapExchange:
    """One step's traffic of hooks and side inputs; the stages on this driver take part like those elsewhere.

    Args:
        step: The number of the step.
        links: To the workers.
        layout: Which rank holds which stage.
        hosted: The stages that this driver holds itself.
        device: This driver's, where hooks are to find what they see.
    """

    def __init__(
        self, step: int, links: Links, layout: Layout, hosted: Mapping[int, Stage], device: torch.device
    ) -> None:
        self._device = device
        self._step = step
        self._links = links
        self._layout = layout
        self._here: dict[tuple[int, int], Tapped] = {}
        self._back: dict[tuple[int, int], dict[int, Tensor]] = {}
        self._shown: dict[int, Shown] = {}
        self._side_gradients: dict[tuple[int, int], Mapping[int, Tensor]] = {}
        for stage in hosted.values():
            stage.driver_side = self

    # ------------------------------------------------- for stages on this rank

    def show(self, stage: int, microbatch: int, tapped: Tapped) -> None:
        """Take what a stage here has to show."""
        self._here[microbatch, stage] = tapped

    def gradients(self, stage: int, microbatch: int) -> dict[int, Tensor]:
        """Return the gradients of what a stage here has shown."""
        return self._back.pop((microbatch, stage))

    def send_gradients(self, stage: int, microbatch: int, gradients: Mapping[int, Tensor]) -> None:
        """Take the gradients of a stage's side inputs."""
        self._side_gradients[microbatch, stage] = gradients

    # --------------------------------------------------------- for the driver

    def collect(self, microbatch: int, path: Path, call: StackCall) -> Shown:
        """Wait for everything that hooks of a microbatch are to see, and that the code after its blocks is to get."""
        shown, grad = Shown(), call.ambient.grad
        self._shown[microbatch] = shown
        exported: dict[Made, Tensor] = {}
        for visit in path.visits:
            blocks = self._layout.blocks(visit.stage)
            made = [each for each in call.exported if each.block in blocks]
            if not made and not any(call.modes[block].hooks for block in blocks):
                continue
            tapped = self._fetch(visit.rank, visit.stage, microbatch)
            pairs = [seen(t, grad and flag) for t, flag in zip(tapped.tensors, tapped.requires_grad, strict=True)]
            own = [pair[1] for pair in pairs]
            shown.events += unpack_events(tapped.events, own)
            shown.tensors += own
            exported.update(zip(made, own[len(own) - len(made) :], strict=True))
            if grad and any(tapped.requires_grad):
                shown.leaves[visit.stage] = [pair[0] for pair in pairs]
        shown.exported = [exported[each] for each in call.exported]
        return shown

    def send_back(self, microbatch: int, path: Path) -> None:
        """Send the gradients that have come to what hooks have seen, before any gradient of the hidden states goes."""
        shown = self._shown.pop(microbatch, None)
        for visit in path.visits if shown is not None else ():
            if shown is None or visit.stage not in shown.leaves:
                continue
            gradients = gradients_of(shown.leaves[visit.stage])
            if visit.rank in self._links:
                entries, blobs = pack_tensors({str(index): gradient for index, gradient in gradients.items()})
                self._links[visit.rank].send(Pulled(self._step, microbatch, visit.stage, entries, blobs))
            else:
                self._back[microbatch, visit.stage] = gradients

    def gradients_of_sides(
        self, microbatch: int, path: Path, spec: CallSpec, sides: Sequence[Tensor]
    ) -> dict[int, Tensor]:
        """Wait for the gradients of a microbatch's side inputs; return by slot their sums, along its path."""
        total: dict[int, Tensor] = {}
        for visit in path.visits:
            if not spec.carried_by(self._layout.blocks(visit.stage)):
                continue
            for slot, gradient in self._gradients_of_stage(visit.rank, visit.stage, microbatch).items():
                here = gradient.to(sides[slot].device)
                total[slot] = total[slot] + here if slot in total else here
        return total

    def _gradients_of_stage(self, rank: int, stage: int, microbatch: int) -> Mapping[int, Tensor]:
        if rank not in self._links:
            return self._side_gradients.pop((microbatch, stage))
        came = self._links[rank].expect_of_stage(answers.SideGradients, self._step, microbatch, stage)
        return {int(name): each for name, each in unpack_tensors(came.tensors, came.blobs).items()}

    def _fetch(self, rank: int, stage: int, microbatch: int) -> Tapped:
        if rank not in self._links:
            return self._here.pop((microbatch, stage))
        seen = self._links[rank].expect_of_stage(answers.Tapped, self._step, microbatch, stage)
        tensors = [each.to(self._device) for each in unpack_tensors(seen.tensors, seen.blobs).values()]
        return Tapped(bytes(seen.events), tuple(tensors), tuple(seen.requires_grad))
