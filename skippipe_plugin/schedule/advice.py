"""When skipping cannot help: the driver, which every microbatch visits, is the limit."""

from skippipe_plugin.schedule.cost import CostModel
from skippipe_plugin.schedule.ir import Schedule
from skippipe_plugin.schedule.simulate import simulate

_FEW = 0.05
"""A gain below this share is not worth what skipping costs in convergence."""
_BOUND = 0.8
"""A driver that works for this share of the step leaves little to gain elsewhere."""


def why_no_gain(planned: Schedule, cost: CostModel, exact_s: float) -> str | None:
    """Say in one line why a plan that skips is hardly faster, where the driver's own work is the reason; else None.

    Args:
        planned: A plan that skips.
        cost: Its costs.
        exact_s: The step in which nothing is skipped, simulated on the same costs.
    """
    timeline = simulate(planned, cost)
    planned_s = timeline.makespan_s
    driver = max(planned.drivers, key=timeline.busy_s)
    share, gain = timeline.busy_share(driver), 1 - planned_s / exact_s if exact_s else 0.0
    if gain >= _FEW or share < _BOUND:
        return None
    count = sum(path.driver == driver for path in planned.paths)
    own, less = ("embedding, head, loss", "")
    if any(driver in ranks for ranks in planned.placement[1:]):
        own, less = (f"{own} and its stage", ", driver_stage=False")
    return (
        f"skipping stages saves {max(gain, 0.0):.1%} of the step ({exact_s:.3g} s -> {planned_s:.3g} s, simulated): "
        f"the driver's own work ({own}: {timeline.busy_s(driver) / count:.3g} s for each of {count} microbatches) is "
        f"{share:.0%} of it; use more drivers, a lighter head, bigger blocks{less}, or skip nothing"
    )
