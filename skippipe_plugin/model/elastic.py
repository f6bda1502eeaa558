"""Runs whose number of stages changes: which settings allow that, and what another number makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..driver.moving import Shape
from ..driver.pipeline import TRAINING
from ..engine.errors import SkipPipeError
from ..partition import cut
from ..schedule import Schedule, swap_ends
from .settings import PipelineSettings
from .skipping import PathPlanner


def check_elastic(settings: PipelineSettings) -> None:
    """Raise SkipPipeError when the number of stages cannot change under these settings, with the way out."""
    reasons = {
        "drivers > 1 (all would have to change at once)": settings.drivers > 1,
        "moe=... (the routers' statistics do not move)": settings.moe is not None,
        "a schedule of your own (it is made for one number of stages)": isinstance(settings.schedule, Schedule),
        "costs from a file (they are those of one number of stages)": settings.paths.costs
        not in ("measure", "uniform"),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise SkipPipeError(f"elastic=True does not go with {' and '.join(found)}; leave one of them out")


class ElasticShapes:
    """What a number of stages makes of one model and one user's settings.

    Args:
        settings: The user's.
        costs: By block: how long it computes, in any unit.
        hosted: How many blocks the driver holds itself: the first ones, whatever the number of stages.
        num_microbatches: Of every schedule: the cut of the batches stays.
        swap: Whether training exchanges the ends of paths.
    """

    def __init__(
        self, settings: PipelineSettings, costs: Sequence[float], hosted: int, num_microbatches: int, *, swap: bool
    ) -> None:
        self._settings = settings
        self._shape = dataclasses.replace(settings.shape, num_microbatches=num_microbatches)
        self._costs = costs
        self._hosted = hosted
        self._swap = swap

    def __call__(self, num_stages: int) -> Shape | None:
        """Return the layout and schedules; None when the skip ratio or the swapped ends do not allow that number."""
        schedules = self._shape.schedules(num_stages)
        try:
            if self._swap:
                schedules[TRAINING] = swap_ends(schedules[TRAINING])
            PathPlanner(self._settings.skip_ratio, self._settings.paths, schedules[TRAINING])
        except ValueError:
            return None
        return Shape(self._shape.layout(self._cut(num_stages)), schedules)

    def _cut(self, num_stages: int) -> tuple[range, ...]:
        first = self._hosted
        if not first:
            return cut(self._costs, num_stages)
        moving = cut(self._costs[first:], num_stages - 1)
        return range(first), *(range(first + blocks.start, first + blocks.stop) for blocks in moving)
