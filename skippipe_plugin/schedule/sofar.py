"""Which microbatches a stage has seen when it goes back through one: the same for any number of replicas.

What is summed over the microbatches of a step so far must not depend on how many workers share them, nor on which of
them is faster. So "so far" goes by number: a microbatch comes after those before it of its driver, and together with
those of the same number of other drivers, and with those that coupled ranks run in one meeting.
"""

from collections.abc import Mapping

from skippipe_plugin.schedule.cost import CostModel
from skippipe_plugin.schedule.ir import Op, Schedule
from skippipe_plugin.schedule.simulate import simulate

SoFar = Mapping[tuple[int, int], tuple[int, ...]]
"""By stage and microbatch: the microbatches so far, itself included, in ascending order."""


def so_far(schedule: Schedule) -> SoFar:
    """Return by (stage, microbatch) the microbatches whose forwards at the stage count by its backward there.

    All those so far by number, as long as the order of a full schedule lets their forwards come first. On partial paths
    one may come only later, and is left out: waiting for it would end in a circle.

    >>> from skippipe_plugin.schedule import full_schedule
    >>> so_far(full_schedule("gpipe", num_stages=1, num_microbatches=3, replicas=2))
    {(1, 0): (0,), (1, 1): (0, 1), (1, 2): (0, 1, 2)}
    """
    begins: dict[tuple[int, int], tuple[float, int]] = {}
    returns: dict[tuple[int, int], tuple[float, int]] = {}
    cost = CostModel.uniform(num_stages=schedule.num_stages, num_ranks=schedule.num_ranks, loss_s=1.0, driver_s=0.1)
    for number, event in enumerate(simulate(schedule, cost).events):
        action, at = event.action, (event.start_s, number)
        if action.stage and action.op is Op.F:
            begins[action.stage, action.microbatch] = at
        elif action.stage and action.op in (Op.B, Op.I):
            returns[action.stage, action.microbatch] = at
    numbers = _numbers(schedule)
    visits: dict[int, list[int]] = {}
    for stage, microbatch in sorted(begins):
        visits.setdefault(stage, []).append(microbatch)
    return {
        (stage, microbatch): tuple(
            other for other in visits[stage] if numbers[other] <= numbers[microbatch] and begins[stage, other] < at
        )
        for (stage, microbatch), at in sorted(returns.items())
    }


def _numbers(schedule: Schedule) -> list[int]:
    """Return by microbatch its number in the step: that of its meeting among those of its driver."""
    per_driver = schedule.num_microbatches // len(schedule.drivers)
    together = max((len(ranks) for ranks in schedule.coupled), default=1)
    return [microbatch % per_driver // together for microbatch in range(schedule.num_microbatches)]
