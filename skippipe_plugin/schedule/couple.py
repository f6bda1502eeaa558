"""Workers that run their stages' actions together: what they meet for, and schedules made for them.

Experts that are sharded over the replicas of a stage exchange tokens in the middle of a forward and of a backward, and
the exchange is one call of all its ranks. So the k-th forward on each of them is one *meeting*, and so is the backward
of the same microbatches. Which of its microbatches a step fills is another matter: a rank whose own is empty takes part
in the meeting without tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from skippipe_plugin.schedule.cost import CostModel, Matrix, NetworkCost
from skippipe_plugin.schedule.ir import Action, Op, Path, Schedule, ScheduleError, Visit


@dataclass(frozen=True, slots=True)
class Meeting:
    """An action of one stage that coupled ranks run together, each on its own microbatch."""

    ranks: tuple[int, ...]
    actions: tuple[Action, ...]
    """By rank."""


def meetings(schedule: Schedule) -> dict[Action, Meeting]:
    """Map each action that coupled ranks run together to their meeting.

    Raises:
        ScheduleError: Coupled ranks hold different stages, or run their microbatches in different orders.
    """
    found: dict[Action, Meeting] = {}
    for ranks in schedule.coupled:
        for stage in _shared_stages(schedule, ranks):
            orders = [[action for action in schedule.orders[rank] if action.stage == stage] for rank in ranks]
            _check_alike(stage, ranks, orders)
            for actions in zip(*orders, strict=True):
                found.update(dict.fromkeys(actions, Meeting(ranks, actions)))
    return found


def _shared_stages(schedule: Schedule, ranks: tuple[int, ...]) -> tuple[int, ...]:
    held = {rank: tuple(stage for stage, on in enumerate(schedule.placement) if stage and rank in on) for rank in ranks}
    if len(ranks) < 2 or len(held) < len(ranks):
        raise ScheduleError(f"the ranks {ranks} cannot be coupled: name two or more different ranks")
    for rank in ranks:
        if rank in schedule.drivers or held[rank] != held[ranks[0]] or not held[rank]:
            raise ScheduleError(
                f"the ranks {ranks} cannot be coupled: rank {rank} holds the stages {held[rank]} and rank {ranks[0]} "
                f"the stages {held[ranks[0]]}; couple workers that are replicas of each other"
            )
    return held[ranks[0]]


def _check_alike(stage: int, ranks: tuple[int, ...], orders: Sequence[Sequence[Action]]) -> None:
    """Raise unless the k-th forwards and their backwards stand at the same places on all ranks."""
    first = _pattern(ranks[0], orders[0])
    for rank, order in zip(ranks, orders, strict=True):
        pattern = _pattern(rank, order)
        if len(pattern) != len(first):
            raise ScheduleError(
                f"the coupled ranks {ranks[0]} and {rank} run {len(first)} and {len(pattern)} actions of stage "
                f"{stage}; give each as many microbatches"
            )
        for action, mine, other in zip(order, pattern, first, strict=True):
            if mine != other:
                raise ScheduleError(
                    f"the coupled ranks {ranks[0]} and {rank} run stage {stage} in different orders: {action} of rank "
                    f"{rank} has no counterpart at its place on rank {ranks[0]}; let the k-th forward and its backward "
                    "stand at the same place on both (skippipe_plugin.schedule.expand does)"
                )


def _pattern(rank: int, order: Sequence[Action]) -> list[tuple[Op, int]]:
    """Return each action with the place of its microbatch among the forwards."""
    places = {action.microbatch: place for place, action in enumerate(action for action in order if action.op is Op.F)}
    halves = [action for action in order if action.op in (Op.I, Op.W)]
    if halves:
        raise ScheduleError(
            f"rank {rank} runs {halves[0]}: tokens travel in the middle of the backward of coupled ranks, so it cannot "
            "be split; write B"
        )
    return [(action.op, places.get(action.microbatch, -1)) for action in order]


def expand(bundled: Schedule, size: int) -> Schedule:
    """Turn a schedule of bundles into one of microbatches on coupled ranks.

    Each worker becomes ``size`` coupled ones, each microbatch (a bundle) as many, one on each of them. What runs for
    bundles runs for their members, so whatever made the schedule needs to know nothing of coupling.

    >>> from skippipe_plugin.schedule import full_schedule
    >>> print(expand(full_schedule("gpipe", num_stages=1, num_microbatches=2, backward=False), 2))
    schedule "gpipe" evaluation
    stage 0 = 0
    stage 1 = 1 2
    coupled 0 = 1 2
    path 0 = 0: 1@1
    path 1 = 0: 1@2
    path 2 = 0: 1@1
    path 3 = 0: 1@2
    rank 0 = 0F0 0F1 0F2 0F3 0L0 0L1 0L2 0L3
    rank 1 = 1F0 1F2
    rank 2 = 1F1 1F3
    """
    drivers, members = len(bundled.drivers), range(size)

    def ranks_of(rank: int) -> list[int]:
        return [rank] if rank < drivers else [drivers + (rank - drivers) * size + member for member in members]

    def member_path(path: Path, member: int) -> Path:
        ranks = [ranks_of(visit.rank) for visit in path.visits]
        on = [each[member % len(each)] for each in ranks]
        return Path(path.driver, tuple(Visit(v.stage, rank) for v, rank in zip(path.visits, on, strict=True)))

    def of(action: Action, member: int) -> Action:
        return replace(action, microbatch=action.microbatch * size + member)

    orders: list[tuple[Action, ...]] = []
    for rank, order in enumerate(bundled.orders):
        if rank < drivers:
            orders.append(tuple(of(action, member) for action in order for member in members))
        else:
            orders += [tuple(of(action, member) for action in order) for member in members]
    return replace(
        bundled,
        placement=tuple(tuple(each for rank in ranks for each in ranks_of(rank)) for ranks in bundled.placement),
        paths=tuple(member_path(path, member) for path in bundled.paths for member in members),
        orders=tuple(orders),
        coupled=tuple(tuple(ranks_of(rank)) for rank in range(drivers, bundled.num_ranks)) if size > 1 else (),
    )


def condense(schedule: Schedule) -> Schedule:
    """Return the schedule of bundles that :func:`expand` makes ``schedule`` from; itself where nothing is coupled.

    Raises:
        ScheduleError: It is not one that :func:`expand` makes.
    """
    if not schedule.coupled:
        return schedule
    size, drivers = len(schedule.coupled[0]), len(schedule.drivers)
    first = [rank for rank in range(schedule.num_ranks) if rank < drivers or (rank - drivers) % size == 0]
    numbers = {rank: number for number, rank in enumerate(first)}

    def of(order: tuple[Action, ...]) -> tuple[Action, ...]:
        own = [action for action in order if action.microbatch % size == 0]
        return tuple(replace(action, microbatch=action.microbatch // size) for action in own)

    def bundled(path: Path) -> Path:
        return Path(path.driver, tuple(Visit(visit.stage, numbers.get(visit.rank, -1)) for visit in path.visits))

    result = replace(
        schedule,
        placement=tuple(tuple(numbers[rank] for rank in ranks if rank in numbers) for ranks in schedule.placement),
        paths=tuple(bundled(path) for path in schedule.paths[::size]),
        orders=tuple(of(schedule.orders[rank]) for rank in first),
        coupled=(),
    )
    if expand(result, size) != schedule:
        raise ScheduleError("the coupled ranks of this schedule do not work on bundles of microbatches; use expand")
    return result


def condense_costs(cost: CostModel, num_drivers: int, size: int) -> CostModel:
    """Return what bundles cost: a group takes as long as its slowest rank, its links as the slowest between two of it.

    A driver does for each member of a bundle what it did for a microbatch.
    """
    if size == 1:
        return cost
    groups: list[tuple[int, ...]] = [(rank,) for rank in range(num_drivers)]
    groups += [tuple(range(first, first + size)) for first in range(num_drivers, cost.num_ranks, size)]
    factors = cost.compute.rank_factor or (1.0,) * cost.num_ranks
    scaled = tuple(max(factors[rank] for rank in ranks) * (size if len(ranks) == 1 else 1) for ranks in groups)
    network = cost.network

    def table(matrix: Matrix, worst: Callable[[Iterable[float]], float]) -> Matrix:
        return tuple(
            tuple(
                matrix[a[0]][a[0]] if a == b else worst(matrix[one][other] for one in a for other in b) for b in groups
            )
            for a in groups
        )

    return replace(
        cost,
        compute=replace(cost.compute, rank_factor=scaled),
        network=NetworkCost(table(network.latency_s, max), table(network.bandwidth_Bps, min), network.overhead_s),
    )
