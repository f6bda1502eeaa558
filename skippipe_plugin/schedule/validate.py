"""The judge of schedules: proves that one can run, or says which action, which rank and the way out.

Pure functions on a `Schedule`. They look at orders and dependencies only, so what they accept runs to its end for
any durations; how long it takes is the simulator's business.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import pairwise

from skippipe_plugin.schedule.couple import Meeting, meetings
from skippipe_plugin.schedule.ir import (
    DRIVER_STAGE,
    Action,
    Op,
    Path,
    Schedule,
    ScheduleError,
    dependencies,
    messages,
    rank_of,
)


def validate(schedule: Schedule, *, memory_caps: Sequence[int] | None = None) -> None:
    """Prove that a schedule can run, or raise.

    What is proved: the placement names existing ranks, drivers first; each path visits distinct stages on ranks that
    hold them; each action that the paths need occurs once, on its rank, and nothing else occurs (``B`` or both of
    ``I`` and ``W``); the ranks, each in its own order, never wait for each other in a circle; and no rank holds more
    activations than its cap. Each message has one producer and one consumer, both of which then occur once, so sends
    and receives match one to one; whether they also match in order is what `in_order_links` tells.

    Args:
        schedule: The schedule to judge.
        memory_caps: By rank, the largest number of (stage, microbatch) pairs that may live there at once, the
            driver's own stage 0 included; see `peak_activations`. None leaves memory alone.

    Raises:
        ScheduleError: One of these does not hold. The message names the action, the rank and the way out.
    """
    validate_routes(schedule)
    _check_actions(schedule)
    topological_order(schedule)
    if memory_caps is not None:
        _check_memory(schedule, memory_caps)


def validate_routes(schedule: Schedule) -> None:
    """Check placement and paths only; a scheduler does so before it orders anything.

    Raises:
        ScheduleError: As `validate` does.
    """
    _check_placement(schedule)
    for microbatch, path in enumerate(schedule.paths):
        _check_path(schedule, microbatch, path)


def topological_order(schedule: Schedule) -> list[Action]:
    """Return all actions in an order in which they can run: each after its inputs and its rank's earlier actions.

    Raises:
        ScheduleError: The ranks wait for each other in a circle, along which the message walks; or an action is
            missing, or one too many.
    """
    inputs = dependencies(schedule)
    together = meetings(schedule)
    consumers: dict[Action, list[int]] = {}
    here: dict[Meeting, set[int]] = {}
    done: dict[Action, None] = {}
    cursors = [0] * schedule.num_ranks
    waiting = deque(range(schedule.num_ranks))
    while waiting:
        rank = waiting.popleft()
        order = schedule.orders[rank]
        while cursors[rank] < len(order):
            action = order[cursors[rank]]
            if action not in inputs or action in done:
                raise ScheduleError(f"rank {rank} runs {action} twice or without a path that needs it; drop it")
            missing = [needed for needed in inputs[action] if needed not in done]
            if missing:
                consumers.setdefault(missing[0], []).append(rank)
                break
            meeting = together.get(action) or Meeting((rank,), (action,))
            here.setdefault(meeting, set()).add(rank)
            if len(here[meeting]) < len(meeting.ranks):
                break
            for each, its in zip(meeting.ranks, meeting.actions, strict=True):
                done[its] = None
                cursors[each] += 1
                waiting.extend(consumers.pop(its, ()))
            waiting.extend(each for each in meeting.ranks if each != rank)
    heads = {
        rank: order[at]
        for rank, (order, at) in enumerate(zip(schedule.orders, cursors, strict=True))
        if at < len(order)
    }
    if heads:
        raise ScheduleError(_deadlock(schedule, heads, done))
    return list(done)


def in_order_links(schedule: Schedule) -> dict[tuple[int, int], bool]:
    """Tell for each directed link (source, destination) whether messages are consumed in the order they are sent.

    A transport that matches by tag (gloo) runs any valid schedule; one that matches by order (NCCL) needs True on
    every link that it serves, or receives posted in send order.
    """
    place = {action: at for order in schedule.orders for at, action in enumerate(order)}
    links: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for message in messages(schedule):
        pair = (place[message.producer], place[message.consumer])
        links.setdefault((message.source, message.destination), []).append(pair)
    return {link: _increasing([consumed for _, consumed in sorted(pairs)]) for link, pairs in links.items()}


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Return by rank the largest number of (stage, microbatch) pairs that are live there at once.

    A pair lives from the start of its first action on the rank (``F``) to the end of its last one: ``B`` or ``W``;
    the driver's stage 0 to its ``0B``, or to ``0L`` in evaluation.
    """
    return tuple(map(_peak, schedule.orders))


def _peak(order: Sequence[Action]) -> int:
    left = Counter((action.stage, action.microbatch) for action in order)
    total, live, peak = dict(left), 0, 0
    for action in order:
        pair = (action.stage, action.microbatch)
        live += left[pair] == total[pair]
        peak = max(peak, live)
        left[pair] -= 1
        live -= left[pair] == 0
    return peak


def _increasing(numbers: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _check_placement(schedule: Schedule) -> None:
    if not schedule.placement or not schedule.drivers:
        raise ScheduleError("the placement has no driver; placement[0] lists the driver ranks, at least rank 0")
    if schedule.drivers != tuple(range(len(schedule.drivers))):
        raise ScheduleError(f"the drivers are ranks {schedule.drivers}; number the ranks so that drivers are 0, 1, ...")
    for stage, ranks in enumerate(schedule.placement):
        for rank in ranks:
            if not 0 <= rank < schedule.num_ranks:
                raise ScheduleError(
                    f"stage {stage} is placed on rank {rank}, but only {schedule.num_ranks} ranks have an order; "
                    "give every rank an order, an empty one if it idles"
                )
        if len(set(ranks)) != len(ranks):
            raise ScheduleError(f"stage {stage} is placed twice on one rank: {ranks}; name each rank once")


def _check_path(schedule: Schedule, microbatch: int, path: Path) -> None:
    where = f"the path of microbatch {microbatch} ({path})"
    if path.driver not in schedule.drivers:
        raise ScheduleError(f"{where} starts at rank {path.driver}, which is no driver; drivers: {schedule.drivers}")
    if not path.visits:
        raise ScheduleError(f"{where} visits no stage; give it at least one")
    for visit in path.visits:
        if not 1 <= visit.stage <= schedule.num_stages:
            raise ScheduleError(f"{where} visits stage {visit.stage}; block stages are 1 to {schedule.num_stages}")
        if visit.rank not in schedule.placement[visit.stage]:
            raise ScheduleError(
                f"{where} visits stage {visit.stage} on rank {visit.rank}, which does not hold it; "
                f"ranks that do: {schedule.placement[visit.stage]}"
            )
    if len(set(path.stages)) != len(path.stages):
        raise ScheduleError(f"{where} visits a stage twice; the stages of a path are distinct")


def _check_actions(schedule: Schedule) -> None:
    wanted = rank_of(schedule)
    seen: set[Action] = set()
    for rank, order in enumerate(schedule.orders):
        for action in order:
            if action not in wanted:
                raise ScheduleError(f"rank {rank} runs {action}: {_why_unwanted(schedule, action)}")
            if wanted[action] != rank:
                raise ScheduleError(
                    f"rank {rank} runs {action}, but the path needs it on rank {wanted[action]}; move it"
                )
            if action in seen:
                raise ScheduleError(f"rank {rank} runs {action} twice; drop one")
            seen.add(action)
    for action, rank in wanted.items():
        if action not in seen:
            raise ScheduleError(f"rank {rank} never runs {action}, which {_path_text(schedule, action)} needs; add it")


def _why_unwanted(schedule: Schedule, action: Action) -> str:
    if not 0 <= action.microbatch < schedule.num_microbatches:
        return f"there is no microbatch {action.microbatch}, only {schedule.num_microbatches} paths; drop it"
    if not schedule.backward and action.op in (Op.B, Op.I, Op.W):
        return "an evaluation schedule has no backward; drop it or set backward=True"
    if action.op is Op.L:
        return "only the driver's stage 0 has a loss; drop it"
    if action.stage == DRIVER_STAGE:
        return "the backward of stage 0 is not split; write B"
    if action.stage not in schedule.paths[action.microbatch].stages:
        return f"{_path_text(schedule, action)} does not visit stage {action.stage}; drop it"
    return "the backward is either B or both of I and W, not B with a half; drop one of the two forms"


def _path_text(schedule: Schedule, action: Action) -> str:
    return f"the path of microbatch {action.microbatch} ({schedule.paths[action.microbatch]})"


def _deadlock(schedule: Schedule, heads: Mapping[int, Action], done: Mapping[Action, None]) -> str:
    """Walk from one blocked rank to the rank it waits for until a rank repeats, and describe that circle."""
    inputs, ranks, together = dependencies(schedule), rank_of(schedule), meetings(schedule)
    walk: dict[int, str] = {}
    rank = min(heads)
    while rank not in walk:
        head = heads[rank]
        needed = next((action for action in inputs[head] if action not in done), None)
        if needed is None:  # it has come to its meeting, and another has not
            pairs = zip(together[head].ranks, together[head].actions, strict=True)
            needed = next(its for each, its in pairs if heads.get(each) != its)
        walk[rank] = f"rank {rank} waits at {head} for {needed} of rank {ranks[needed]}"
        rank = ranks[needed]
        if rank not in heads:
            return f"{walk.popitem()[1]}, which never runs it; add {needed} there"
    circle = list(walk.values())[list(walk).index(rank) :]
    return f"deadlock: {'; '.join(circle)}; order the actions so that one of them comes later, or use list_schedule"


def _check_memory(schedule: Schedule, memory_caps: Sequence[int]) -> None:
    if len(memory_caps) != schedule.num_ranks:
        raise ScheduleError(f"{len(memory_caps)} memory caps for {schedule.num_ranks} ranks; give one per rank")
    for rank, (peak, cap) in enumerate(zip(peak_activations(schedule), memory_caps, strict=True)):
        if peak > cap:
            raise ScheduleError(
                f"rank {rank} holds more than its cap of {cap} activations at "
                f"{_first_above(schedule.orders[rank], cap)} ({peak} at most); "
                "run a backward before that forward (list_schedule with activation_caps), or raise the cap"
            )


def _first_above(order: Sequence[Action], cap: int) -> Action:
    """Return the action that takes the rank above its cap."""
    return next(action for at, action in enumerate(order) if _peak_until(order, at) > cap)


def _peak_until(order: Sequence[Action], last: int) -> int:
    ends = {(action.stage, action.microbatch): at for at, action in enumerate(order)}
    begun = {(action.stage, action.microbatch) for action in order[: last + 1]}
    return sum(ends[pair] >= last for pair in begun)
