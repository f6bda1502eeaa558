"""When a running schedule gives way to a new plan: the decision, without anything that runs.

Both are simulated on the same fresh costs. What is planned from noisy costs looks better on them than it is, so a plan
must win by a margin, and twice: on the medians it was planned from, and on the next measured step, which it was not
planned from. And schedules are left some time.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from skippipe_plugin.checked import COUNT, PART, checked
from skippipe_plugin.schedule.cost import CostModel
from skippipe_plugin.schedule.ir import Schedule
from skippipe_plugin.schedule.partial import Plan, least_s
from skippipe_plugin.schedule.problem import PlanProblem
from skippipe_plugin.schedule.simulate import simulate


@checked(min_gain=PART, min_steps=COUNT)
@dataclass(frozen=True, kw_only=True, slots=True)
class SwitchRule:
    """How much better a plan has to be, and how often the schedule may change.

    >>> rule = SwitchRule(min_gain=0.05, min_steps=20)
    >>> rule.permits(1.0, 0.9, steps=20), rule.permits(1.0, 0.96, steps=20), rule.permits(1.0, 0.9, steps=19)
    (True, False, False)

    Raises:
        ValueError: A value is out of range.
    """

    min_gain: float = 0.05
    """The share of the running schedule's time that a plan must save, simulated on the same costs."""
    min_steps: int = 20
    """How many steps a schedule runs at least."""

    def permits(self, present_s: float, planned_s: float, steps: int) -> bool:
        """Tell whether a plan of ``planned_s`` may replace a schedule that has run for so many steps."""
        return steps >= self.min_steps and planned_s <= (1 - self.min_gain) * present_s


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of a look at the running schedule."""

    present_s: float
    """Its step, simulated on the fresh costs."""
    planned_s: float | None
    """That of a plan; None where none was looked at."""
    schedule: Schedule | None
    """What replaces it; None: it stays."""
    reason: str
    """One line for people."""


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What a schedule and its best alternative depend on."""

    present_s: float
    bound_s: float
    busy_s: tuple[float, ...]
    """By rank."""

    def is_near(self, other: "_Outlook", seconds: float) -> bool:
        mine, theirs = ((look.present_s, look.bound_s, *look.busy_s) for look in (self, other))
        return all(abs(a - b) <= seconds for a, b in zip(mine, theirs, strict=True))


class Balancer:
    """Looks at the running schedule now and then, and remembers when it changed and when it was last planned anew.

    Planning takes as long as many short steps do, so it is left out where it cannot pay: where the lower bound is
    too near, and where hardly anything has changed since the last plan that was turned down.
    """

    def __init__(self, rule: SwitchRule) -> None:
        self.rule = rule
        self._schedule: Schedule | None = None
        self._since = 0
        self._turned_down: _Outlook | None = None
        self._candidate: Schedule | None = None

    def decide(
        self,
        schedule: Schedule,
        step: int,
        costs: CostModel,
        latest: CostModel,
        problem: PlanProblem,
        replan: Callable[[], Plan],
    ) -> Decision:
        """Keep the schedule or replace it.

        Args:
            schedule: What runs.
            step: The number of optimizer steps so far.
            costs: The medians of the measured steps, for the ranks of the schedule.
            latest: The costs of the last measured step alone.
            problem: What would be planned, on the medians; where ranks are coupled, for groups of them.
            replan: Plans it, for the ranks of the schedule.
        """
        self._note(schedule, step)
        if self._candidate is not None:
            return self._confirm(self._candidate, schedule, step, costs, latest)
        timeline, rule = simulate(schedule, costs), self.rule
        present_s = timeline.makespan_s
        steps = step - self._since
        if steps < rule.min_steps:
            return Decision(present_s, None, None, f"the schedule has run for {steps} of min_steps={rule.min_steps}")
        busy_s = tuple(map(timeline.busy_s, range(schedule.num_ranks)))
        outlook = _Outlook(present_s, least_s(problem), busy_s)
        if not rule.permits(present_s, outlook.bound_s, steps):
            why = f"no plan is faster than {_seconds(outlook.bound_s)}, the running one takes {_seconds(present_s)}"
            return Decision(present_s, None, None, why)
        if self._turned_down is not None and outlook.is_near(self._turned_down, rule.min_gain / 2 * present_s):
            return Decision(present_s, None, None, "costs are as they were when the last plan was turned down")
        new, self._turned_down = replan().schedule, outlook
        planned_s = simulate(new, costs).makespan_s
        change = _change(present_s, planned_s)
        if not rule.permits(present_s, planned_s, steps):
            return Decision(present_s, planned_s, None, f"{change}: saves less than min_gain={rule.min_gain:.0%}")
        self._candidate = new
        return Decision(present_s, planned_s, None, f"{change}: the next measured step has to confirm it")

    def _confirm(self, new: Schedule, schedule: Schedule, step: int, costs: CostModel, latest: CostModel) -> Decision:
        self._candidate = None
        present_s, planned_s = (simulate(each, latest).makespan_s for each in (schedule, new))
        change = _change(present_s, planned_s)
        if not self.rule.permits(present_s, planned_s, step - self._since):
            return Decision(present_s, planned_s, None, f"{change}: the gain was not confirmed")
        self._note(new, step)
        return Decision(present_s, planned_s, new, f"{change}; {_why(schedule, new, costs)}")

    def _note(self, schedule: Schedule, step: int) -> None:
        if schedule != self._schedule:
            self._since = step if self._schedule is not None else 0
            self._schedule, self._turned_down, self._candidate = schedule, None, None


def _why(old: Schedule, new: Schedule, cost: CostModel) -> str:
    """Name the ranks that have more to do, or less, and how their time compares with their replicas'."""
    before, after = _visits(old), _visits(new)
    changes = [
        f"rank {rank}{_factor(cost, rank)} {before[rank]} -> {after[rank]}"
        for rank in range(old.num_ranks)
        if before[rank] != after[rank]
    ]
    return f"visits: {', '.join(changes)}" if changes else "the same visits in another order"


def _visits(schedule: Schedule) -> Counter[int]:
    return Counter(visit.rank for path in schedule.paths for visit in path.visits)


def _factor(cost: CostModel, rank: int) -> str:
    factor = cost.compute.rank_factor[rank] if cost.compute.rank_factor else 1.0
    return f" ({factor:.2g}x)" if factor != 1.0 else ""


def _change(present_s: float, planned_s: float) -> str:
    return f"{_seconds(present_s)} -> {_seconds(planned_s)} ({planned_s / present_s - 1:+.0%}), simulated"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"
