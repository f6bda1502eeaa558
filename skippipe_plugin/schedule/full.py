"""Exact schedules: every microbatch visits every stage in order.

They differ only in the order of actions. Each generator takes any placement and paths, so that partial paths can run
in the same orders; `full_schedule` builds the placement and the paths of the exact case.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from skippipe_plugin.schedule.ir import Action, Op, Path, Schedule, ScheduleError, Visit, chain
from skippipe_plugin.schedule.order import list_schedule, turns
from skippipe_plugin.schedule.validate import validate


class Generator(Protocol):
    """Orders the actions of given paths on a given placement."""

    def __call__(
        self, placement: Sequence[Sequence[int]], paths: Sequence[Path], *, backward: bool = True
    ) -> Schedule: ...


def gpipe(placement: Sequence[Sequence[int]], paths: Sequence[Path], *, backward: bool = True) -> Schedule:
    """Run all forwards, then all losses, then all backwards, the oldest microbatch first.

    The order that waits least for slow links, at the price of holding every microbatch's activations. With p stages
    of F and B seconds and m microbatches on a free driver and free links it takes ``(m + p - 1) (F + B)`` and holds
    m activations (Huang et al. 2019, arXiv 1811.06965).

    Raises:
        ScheduleError: The placement or a path is not legal.
    """
    num_ranks = 1 + max((rank for ranks in placement for rank in ranks), default=-1)
    orders: list[list[tuple[int, tuple[int, int], int, Action]]] = [[] for _ in range(num_ranks)]
    ages = turns(paths)
    for microbatch, path in enumerate(paths):
        for step, (action, rank) in enumerate(chain(path, microbatch, backward=backward)):
            if not 0 <= rank < num_ranks:
                raise ScheduleError(
                    f"the path of microbatch {microbatch} ({path}) uses rank {rank}, which holds nothing"
                )
            orders[rank].append((_PHASE[action.op], ages[microbatch], step, action))
    schedule = Schedule(
        placement=tuple(map(tuple, placement)),
        paths=tuple(paths),
        orders=tuple(tuple(action for *_, action in sorted(order)) for order in orders),
        backward=backward,
        name="gpipe",
    )
    validate(schedule)
    return schedule


def one_f_one_b(placement: Sequence[Sequence[int]], paths: Sequence[Path], *, backward: bool = True) -> Schedule:
    """Alternate forward and backward once the pipeline is full.

    As fast as GPipe on free links, while the stage at position i of p holds ``min(m, p + 1 - i)`` activations only:
    the 1F1B of p + 1 stages (Narayanan et al. 2021, arXiv 2104.04473), since the loss on the driver is the last of
    them. Each driver keeps twice its share of the pipeline in flight, so that its own hop is hidden: with fewer, every
    slow link is paid for once per microbatch.

    Raises:
        ScheduleError: The placement or a path is not legal.
    """
    drivers, length = len(placement[0]), max((len(path.visits) for path in paths), default=1)
    width = max(map(len, placement[1:]), default=1)
    share = max(1, -(-length * width // max(drivers, 1)))
    return list_schedule(
        placement,
        paths,
        activation_caps="position",
        driver_in_flight=2 * share,
        backward=backward,
        name="1f1b",
    )


FULL_SCHEDULES: Mapping[str, Generator] = MappingProxyType({"gpipe": gpipe, "1f1b": one_f_one_b})
"""The generators by the name a user gives."""

_PHASE = {Op.F: 0, Op.L: 1, Op.B: 2}


def full_schedule(
    name: str,
    *,
    num_stages: int,
    num_microbatches: int,
    replicas: int = 1,
    drivers: int = 1,
    driver_stage: bool = False,
    backward: bool = True,
) -> Schedule:
    """Build the exact schedule of that name: every microbatch visits stages 1 to ``num_stages`` in order.

    >>> print(full_schedule("1f1b", num_stages=2, num_microbatches=2))
    schedule "1f1b" training
    stage 0 = 0
    stage 1 = 1
    stage 2 = 2
    path 0 = 0: 1@1 2@2
    path 1 = 0: 1@1 2@2
    rank 0 = 0F0 0F1 0L0 0L1 0B0 0B1
    rank 1 = 1F0 1F1 1B0 1B1
    rank 2 = 2F0 2F1 2B0 2B1

    Args:
        name: A key of ``FULL_SCHEDULES``.
        num_stages: Number of block stages.
        num_microbatches: Number of microbatches of each driver; driver d has numbers d*M to (d+1)*M - 1.
        replicas: Number of workers that hold each stage; microbatch i of driver d takes replica (i + d) mod R.
        drivers: Number of drivers, ranks 0 to D - 1.
        driver_stage: Whether each driver holds stage 1 itself, for its own microbatches, in place of workers.
        backward: False for evaluation.

    Raises:
        ValueError: The name is unknown or a count is below 1.
    """
    if name not in FULL_SCHEDULES:
        raise ValueError(f"there is no schedule {name!r}; choose one of {', '.join(FULL_SCHEDULES)}")
    counts = {"num_stages": num_stages, "num_microbatches": num_microbatches, "replicas": replicas, "drivers": drivers}
    for argument, count in counts.items():
        if count < 1:
            raise ValueError(f"{argument} is {count}; it must be at least 1")
    placement = _placement(num_stages, replicas, drivers, driver_stage)
    paths = [_path(placement, driver, i, driver_stage) for driver in range(drivers) for i in range(num_microbatches)]
    return FULL_SCHEDULES[name](placement, paths, backward=backward)


def _placement(num_stages: int, replicas: int, drivers: int, driver_stage: bool) -> list[tuple[int, ...]]:
    own = tuple(range(drivers))
    remote = num_stages - driver_stage
    workers = [tuple(range(first, first + replicas)) for first in range(drivers, drivers + remote * replicas, replicas)]
    return [own, *([own] if driver_stage else []), *workers]


def _path(placement: Sequence[Sequence[int]], driver: int, index: int, driver_stage: bool) -> Path:
    """Build the path of a driver's microbatch with that index: replicas take turns, its own stage is its own."""
    visits = [Visit(stage, ranks[(index + driver) % len(ranks)]) for stage, ranks in enumerate(placement) if stage]
    if driver_stage:
        visits[0] = Visit(1, driver)
    return Path(driver, tuple(visits))
