"""Where the driver is the limit, skipping is advised against, with figures; elsewhere nothing is said."""

import pytest

from skippipe_plugin.schedule import CostModel, PathConstraints, PlanProblem, full_schedule, plan, simulate
from skippipe_plugin.schedule.advice import why_no_gain


def advice(*, loss_s: float, driver_stage: bool = False, latency_s: float = 0.0) -> str | None:
    exact = full_schedule("1f1b", num_stages=4, num_microbatches=8, driver_stage=driver_stage)
    cost = CostModel.uniform(4, exact.num_ranks, loss_s=loss_s, driver_s=0.1, latency_s=latency_s)
    constraints = PathConstraints(skip_ratio=0.25)
    problem = PlanProblem(placement=exact.placement, microbatches_per_driver=8, cost=cost, constraints=constraints)
    planned = plan(problem, max_iterations=20_000).schedule
    return why_no_gain(planned, cost, simulate(exact, cost).makespan_s)


def test_a_heavy_head_is_named() -> None:
    line = advice(loss_s=100.0)
    assert line is not None
    assert "\n" not in line
    assert "(embedding, head, loss: 100 s for each of 8 microbatches) is 99% of it" in line
    assert "more drivers, a lighter head, bigger blocks, or skip nothing" in line


def test_a_driver_that_holds_a_stage_is_told_not_to() -> None:
    line = advice(loss_s=100.0, driver_stage=True)
    assert line is not None
    assert "driver_stage=False" in line


@pytest.mark.parametrize("latency_s", [0.0, 5.0])
def test_nothing_is_said_where_skipping_helps(latency_s: float) -> None:
    assert advice(loss_s=0.1, latency_s=latency_s) is None
