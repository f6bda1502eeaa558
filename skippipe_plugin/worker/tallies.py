"""Tallies of experts' visits for the stages of one rank, step by step; a driver that holds a stage has them too."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from ..engine.stage import Stage
from ..moe.attach import RouterHook
from ..moe.tally import Post, Tally
from ..schedule import Schedule
from ..schedule.sofar import SoFar, so_far

Loads = dict[str, list[int]]
"""By router: the visits of each expert, and of all null experts."""


class StageTallies:
    """Counts for the balancing loss of the routers, where they have one."""

    def __init__(self) -> None:
        self._schedule: Schedule | None = None
        self._so_far: SoFar = {}
        self._open: list[tuple[Stage, Tally, list[RouterHook]]] = []

    def open(
        self,
        schedule: Schedule,
        live: Collection[int],
        stages: Mapping[int, Stage],
        *,
        rank: int,
        base: Mapping[str, Sequence[int]],
        post: Post,
    ) -> None:
        """Begin a training step.

        Args:
            schedule: What runs.
            live: The microbatches of all drivers that are not empty.
            stages: Those of this rank.
            rank: This one.
            base: By router: the visits of earlier batches of the same optimizer step.
            post: To the other ranks.
        """
        self.close()
        for number, stage in stages.items():
            hooks = balancing_hooks(stage.blocks.values())
            if not hooks:
                continue
            if schedule is not self._schedule:
                self._schedule, self._so_far = schedule, so_far(schedule)
            counted = {
                microbatch: tuple(each for each in others if each in live)
                for (at, microbatch), others in self._so_far.items()
                if at == number and microbatch in live
            }
            ranks = {
                microbatch: visit.rank
                for microbatch in counted
                for visit in schedule.paths[microbatch].visits
                if visit.stage == number
            }
            stage.witness = tally = Tally(
                {hook.name: hook.width for hook in hooks},
                counted,
                ranks,
                rank,
                base={name: torch.tensor(loads) for name, loads in base.items()},
                post=post,
                tag=_first_tag(schedule, number),
            )
            for hook in hooks:
                hook.tally = tally
            self._open.append((stage, tally, hooks))

    def close(self) -> Loads:
        """End it; return the visits of this rank's microbatches."""
        loads: Loads = {}
        for stage, tally, hooks in self._open:
            loads |= {name: each.tolist() for name, each in tally.own().items()}
            stage.witness = None
            for hook in hooks:
                hook.tally = None
        self._open.clear()
        return loads


def balancing_hooks(blocks: Collection[nn.Module]) -> list[RouterHook]:
    """Return the hooks of routers that have a balancing loss."""
    hooks = (hook for block in blocks for module in block.modules() for hook in module._forward_hooks.values())
    return [hook for hook in hooks if isinstance(hook, RouterHook) and hook.loss_coefficient]


def _first_tag(schedule: Schedule, stage: int) -> int:
    """Return a tag after all of the schedule's own messages, and those of lower stages' tallies."""
    microbatches = schedule.num_microbatches
    return 2 * (microbatches + 1) * (schedule.num_stages + 1) + 2 + stage * microbatches
