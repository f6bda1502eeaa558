"""Which paths the next training steps take: a skip ratio over time, costs, and the planner between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from ..schedule import (
    CostModel,
    Plan,
    Schedule,
    condense,
    condense_costs,
    expand,
    peak_activations,
    simulate,
)
from ..schedule.advice import why_no_gain
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

    Raises:
        ValueError: A function returned what is no ratio.
    """
    if callable(skip_ratio):
        ratio = skip_ratio(step)
        _check(f"skip_ratio({step})", ratio)
        return float(ratio)
    if isinstance(skip_ratio, Mapping):
        begun = [start for start in skip_ratio if start <= step]
        return float(skip_ratio[max(begun)]) if begun else 0.0
    return float(skip_ratio)


def check_ratio(skip_ratio: SkipRatio) -> None:
    """Raise ValueError for a ratio that cannot be (functions are checked when they are called)."""
    if isinstance(skip_ratio, Mapping):
        for step, ratio in skip_ratio.items():
            if isinstance(step, bool) or not isinstance(step, int):
                raise ValueError(f"skip_ratio={dict(skip_ratio)} maps {step!r}; it maps optimizer steps to ratios")
            if step < 0:
                raise ValueError(f"skip_ratio={dict(skip_ratio)} begins before step 0")
            _check(f"skip_ratio[{step}]", ratio)
    elif not callable(skip_ratio):
        _check("skip_ratio", skip_ratio)


def _check(name: str, ratio: object) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ValueError(f"{name}={ratio!r} is not a number; give a share of the stages")
    if not 0 <= ratio < 1:
        raise ValueError(f"{name}={ratio} is out of range; it is at least 0 and below 1")


def skips(skip_ratio: SkipRatio) -> bool:
    """Whether any stage may ever be skipped."""
    return callable(skip_ratio) or any(_known_ratios(skip_ratio))


def _known_ratios(skip_ratio: SkipRatio) -> Iterator[float]:
    """The ratios above 0 that are sure to come."""
    if not callable(skip_ratio):
        yield from filter(None, skip_ratio.values() if isinstance(skip_ratio, Mapping) else [skip_ratio])


class PathPlanner:
    """Plans a run's paths anew when the ratio changes, or when what it needs to know becomes known.

    Args:
        skip_ratio: The ratio over the steps.
        config: Constraints, and where the costs come from.
        exact: The schedule that skips nothing; its placement is kept.

    Raises:
        ValueError: No plan can exist for a ratio, or the costs cannot be used; the message names the reason.
    """

    def __init__(self, skip_ratio: SkipRatio, config: PathConfig, exact: Schedule) -> None:
        self._skip_ratio = skip_ratio
        self._config = config
        self._exact = exact
        self._bundled = condense(exact)
        self._size = exact.num_microbatches // self._bundled.num_microbatches
        self._steps = 0
        self._ratio: float | None = None
        self._visits: Counter[int] = Counter()
        """By stage: the visits of all steps."""
        self._visits_per_step: Counter[int] = Counter()
        self.required: tuple[int, ...] | None = None
        """The stages that change the form of the hidden states, which every path visits; None until they are known."""
        self.cost = _costs(config, exact)
        """What plans are made from; None until it has been measured."""
        for ratio in _known_ratios(skip_ratio):  # what cannot be planned must not wait for the measured costs
            plan(self.problem(ratio, CostModel.uniform(exact.num_stages, exact.num_ranks)), max_iterations=1)

    @property
    def ratio(self) -> float:
        """The skip ratio of the last step."""
        return self._ratio or 0.0

    @property
    def needs_costs(self) -> bool:
        """Whether costs must be measured before anything is skipped."""
        return self.cost is None and skips(self._skip_ratio)

    @property
    def measures(self) -> bool:
        """Whether the coming step is the one to take the costs from."""
        return self.needs_costs and self._steps + 1 == _MEASURED_STEP

    @property
    def has_measured(self) -> bool:
        """Whether the step to take the costs from has begun before."""
        return self.needs_costs and self._steps >= _MEASURED_STEP

    def next(self, step: int) -> Schedule | None:
        """Return the schedule of the coming training step, or None when it is that of the step before.

        Until costs and forms are known every stage is visited.

        Args:
            step: The number of optimizer steps so far.
        """
        self._steps += 1
        is_ready = self.cost is not None and self.required is not None
        ratio = ratio_at(self._skip_ratio, step) if is_ready else 0.0
        schedule = None
        if ratio != self._ratio:
            self._ratio = ratio
            schedule = self.plan(self.cost).schedule if ratio and self.cost is not None else self._exact
            self.adopt(schedule)
        self._visits += self._visits_per_step
        return schedule

    def advice(self, planned: Schedule) -> str | None:
        """Say why a plan that skips hardly helps, if the driver is the reason; None else."""
        if self.cost is None or not self.ratio:
            return None
        return why_no_gain(planned, self.cost, simulate(self._exact, self.cost).makespan_s)

    def adopt(self, schedule: Schedule) -> None:
        """Count the visits of the following steps by this schedule."""
        self._visits_per_step = Counter(stage for path in schedule.paths for stage in path.stages)

    def plan(self, cost: CostModel) -> Plan:
        """Plan paths of the present skip ratio; stages that earlier steps skipped more often come first."""
        history = [self._visits[stage] for stage in range(1, self._exact.num_stages + 1)]
        found = plan(self.problem(self.ratio, cost), max_iterations=_WORK, seed=self._config.seed, history=history)
        return replace(found, schedule=expand(found.schedule, self._size))

    def problem(self, ratio: float, cost: CostModel) -> PlanProblem:
        """Return what the planner is asked; at ratio 0 it chooses replicas and orders, within the schedule's memory.

        Where ranks are coupled it plans for the bundles of microbatches that they work on together.
        """
        self._check_required(ratio)
        exact, config = self._bundled, self._config
        swaps = config.max_swaps if ratio else 0
        return PlanProblem(
            placement=exact.placement,
            microbatches_per_driver=exact.num_microbatches // len(exact.drivers),
            cost=condense_costs(cost, len(exact.drivers), self._size),
            constraints=PathConstraints(
                skip_ratio=ratio,
                max_jump=config.max_jump,
                max_swaps=swaps,
                max_back=config.max_back,
                required=self.required or (),
            ),
            memory_caps=None if ratio else _caps(exact),
            links="queued",
        )

    def _check_required(self, ratio: float) -> None:
        num_stages = self._exact.num_stages
        visits, required = PathConstraints(skip_ratio=ratio).num_visits(num_stages), self.required or ()
        least = min(len(required) + 1, num_stages)  # with one more each other stage is visited by some path
        if visits < least:
            raise ValueError(
                f"skip_ratio={ratio} makes paths of {visits} stages, but the stages {required} change the form of the "
                "hidden states or make what is used elsewhere, so every path visits them, and the other "
                f"{num_stages - len(required)} stages would never be visited; lower the ratio to "
                f"{math.floor(100 * (num_stages - least) / num_stages) / 100}"
            )


def _costs(config: PathConfig, exact: Schedule) -> CostModel | None:
    stages, ranks = exact.num_stages, exact.num_ranks
    if config.costs == "uniform":
        return CostModel.uniform(stages, ranks)
    if config.costs == "measure":
        return None
    try:
        cost = CostModel.load(config.costs)
    except FileNotFoundError:
        raise ValueError(f"costs={config.costs!r}: no such file; give a cost model, 'measure' or 'uniform'") from None
    except ValueError as error:
        raise ValueError(f"costs={config.costs!r}: {error}") from error
    if (cost.num_stages, cost.num_ranks) != (stages, ranks):
        raise ValueError(
            f"costs={config.costs!r} is for {cost.num_stages} block stages and {cost.num_ranks} ranks, and this run "
            f"has {stages} and {ranks}; measure its costs (costs='measure')"
        )
    return cost


def _caps(schedule: Schedule) -> tuple[int, ...]:
    """By rank, what a schedule may hold beside ``schedule``: each worker as much as the fullest one there."""
    peaks, num_drivers = peak_activations(schedule), len(schedule.drivers)
    return peaks[:num_drivers] + (max(peaks[num_drivers:], default=1),) * (len(peaks) - num_drivers)
