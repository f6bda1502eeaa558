"""Which paths the next training steps take: a skip ratio over time, costs, and the planner between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Final

from ..schedule import CostModel, Schedule
from ..schedule.partial import plan
from ..schedule.problem import PlanProblem
from ..schedule.routes import PathConstraints
from .config import PathConfig

SkipRatio = float | Mapping[int, float] | Callable[[int], float]
"""A share of the stages, the same always, by the step from which it holds, or as a function of the step."""

_MEASURED_STEP: Final = 2
"""The training step whose costs are taken: the first one still warms up."""
_WORK: Final = 100_000
"""Iterations of the planner: a few tenths of a second, and the same plan for the same costs on any machine."""


def ratio_at(skip_ratio: SkipRatio, step: int) -> float:
    """Return the skip ratio at an optimizer step.

    >>> ratio_at({100: 0.25, 900: 0.0}, 99), ratio_at({100: 0.25, 900: 0.0}, 500)
    (0.0, 0.25)
    """
    if callable(skip_ratio):
        return float(skip_ratio(step))
    if isinstance(skip_ratio, Mapping):
        begun = [start for start in skip_ratio if start <= step]
        return float(skip_ratio[max(begun)]) if begun else 0.0
    return float(skip_ratio)


def check_ratio(skip_ratio: SkipRatio) -> None:
    """Raise ValueError for a ratio that cannot be (functions are checked when they are called)."""
    if callable(skip_ratio):
        return
    for ratio in skip_ratio.values() if isinstance(skip_ratio, Mapping) else [skip_ratio]:
        PathConstraints(skip_ratio=ratio)
    if isinstance(skip_ratio, Mapping) and any(step < 0 for step in skip_ratio):
        raise ValueError(f"skip_ratio={dict(skip_ratio)} begins before step 0")


def skips(skip_ratio: SkipRatio) -> bool:
    """Whether any stage may ever be skipped."""
    if callable(skip_ratio):
        return True
    return any(skip_ratio.values()) if isinstance(skip_ratio, Mapping) else skip_ratio > 0


class PathPlanner:
    """Plans a run's training paths anew when the ratio changes or the costs become known.

    Args:
        skip_ratio: The ratio over the steps.
        config: Constraints, and where the costs come from.
        exact: The schedule that skips nothing; its placement is kept.
    """

    def __init__(self, skip_ratio: SkipRatio, config: PathConfig, exact: Schedule) -> None:
        self._skip_ratio = skip_ratio
        self._config = config
        self._exact = exact
        self._steps = 0
        self._planned: float | None = None
        self._visits = (0,) * exact.num_stages
        self.cost: CostModel | None = None
        """What plans are made from; None until it has been measured."""
        if config.costs == "uniform":
            self.cost = CostModel.uniform(exact.num_stages, exact.num_ranks)
        elif config.costs != "measure":
            self.cost = CostModel.from_json(FilePath(config.costs).read_text(encoding="utf-8"))
            self.cost.check_covers(exact.num_stages, exact.num_ranks)

    @property
    def measures(self) -> bool:
        """Whether the coming step is the one to take the costs from."""
        return self.cost is None and self._steps + 1 == _MEASURED_STEP

    def next(self, step: int) -> Schedule | None:
        """Return the schedule of the coming training step, or None when it is that of the step before.

        Until the costs are known every stage is visited.

        Args:
            step: The number of optimizer steps so far.
        """
        self._steps += 1
        ratio = ratio_at(self._skip_ratio, step) if self.cost is not None else 0.0
        if ratio == self._planned:
            return None
        self._planned = ratio
        return self.plan(ratio) if ratio else self._exact

    def plan(self, ratio: float) -> Schedule:
        """Plan paths of a skip ratio; stages that earlier plans skipped more often come first."""
        assert self.cost is not None
        config = self._config
        problem = PlanProblem(
            placement=self._exact.placement,
            microbatches_per_driver=self._exact.num_microbatches // len(self._exact.drivers),
            cost=self.cost,
            constraints=PathConstraints(
                skip_ratio=ratio, max_jump=config.max_jump, max_swaps=config.max_swaps, max_back=config.max_back
            ),
        )
        found = plan(problem, max_iterations=_WORK, seed=config.seed, history=self._visits)
        self._visits = tuple(map(sum, zip(self._visits, found.visits, strict=True)))
        return found.schedule
