"""A schedule as one rank reads it: its actions in order, each with the links it receives from and sends to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from ..schedule import DRIVER_STAGE, Action, Meeting, Op, Path, Schedule, meetings


@dataclass(frozen=True, slots=True)
class Link:
    """The far end of a message and the tag that both ends derive from the schedule."""

    rank: int
    tag: int
    place: int
    """How many messages its sender sends to its receiver before it, when nothing is left out."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One action of a rank. A hop ``h`` is the tensor that enters visit ``h``; the last returns to the driver."""

    action: Action
    text: str
    takes: int | None
    """The hop whose tensor (F, L) or gradient (B, I) it takes; None for ``0F`` and W."""
    gives: int | None
    """The hop whose tensor (F, L: gradient) or gradient (B, I) it gives; None for ``0B`` and W."""
    receives: Link | None
    """Where it takes from; None when that is this rank."""
    sends: Link | None
    """Where it gives to; None when that is this rank."""
    together: tuple[int, ...] = ()
    """The microbatches of all coupled ranks in the meeting that this action is a part of, by position."""
    microbatch: int = field(init=False, repr=False, compare=False)
    """The microbatch it works on."""
    on_driver: bool = field(init=False, repr=False, compare=False)
    """Whether it is one of the driver's stage 0."""
    takes_forward: bool = field(init=False, repr=False, compare=False)
    """Whether it takes a tensor, not a gradient."""

    def __post_init__(self) -> None:
        """Derive what is asked in every step."""
        object.__setattr__(self, "microbatch", self.action.microbatch)
        object.__setattr__(self, "on_driver", self.action.stage == DRIVER_STAGE)
        object.__setattr__(self, "takes_forward", self.action.op in (Op.F, Op.L))


class Plan:
    """What a rank does in the steps of a program with the same live microbatches.

    Args:
        program: All that it does where every microbatch is live.
        live: The microbatches of the step.
    """

    def __init__(self, program: Iterable[Instruction], live: Collection[int]) -> None:
        self.live = frozenset(live)
        together = self.live.isdisjoint
        self.instructions = [e for e in program if e.microbatch in self.live or not together(e.together)]
        self.receiving: dict[int, list[Instruction]] = {}
        """By live microbatch: those that take what comes from elsewhere."""
        for each in self.instructions:
            if each.microbatch in self.live:
                receiving = self.receiving.setdefault(each.microbatch, [])
                receiving += [each] if each.receives is not None else []


class Plans:
    """The plans of one program; mostly the next step's is that of the one before."""

    def __init__(self, program: tuple[Instruction, ...]) -> None:
        self.program = program
        self._last = Plan(program, ())

    def of(self, live: Collection[int]) -> Plan:
        """Return what to do for these microbatches."""
        if self._last.live != (wanted := frozenset(live)):
            self._last = Plan(self.program, wanted)
        return self._last


def compile_program(schedule: Schedule, rank: int) -> tuple[Instruction, ...]:
    """Return the instructions of ``rank``, in the order of the schedule."""
    places, coupled = _places(schedule), meetings(schedule)
    return tuple(_instruction(schedule, action, rank, places, coupled.get(action)) for action in schedule.orders[rank])


def embedded_in_order(program: Iterable[Instruction]) -> list[int]:
    """Return the microbatches that a driver's program embeds, in that order."""
    return [each.microbatch for each in program if each.action.stage == DRIVER_STAGE and each.action.op is Op.F]


def most_in_flight(program: Iterable[Instruction]) -> int:
    """Return of how many microbatches a driver's program keeps the embeddings at once, for their backward."""
    steps = {Op.F: 1, Op.B: -1}
    changes = [steps.get(each.action.op, 0) for each in program if each.action.stage == DRIVER_STAGE]
    return max(accumulate(changes), default=0)


def directed_links(*schedules: Schedule) -> set[tuple[int, int]]:
    """Return the (source, destination) pairs that exchange messages in any of ``schedules``."""
    return {(source, destination) for schedule in schedules for source, destination, _ in _places(schedule)}


_Places = dict[tuple[int, int, int], int]
"""By source, destination and tag: how many messages go from this source to this destination before."""


def _places(schedule: Schedule) -> _Places:
    places: _Places = {}
    counts: Counter[tuple[int, int]] = Counter()
    for source, order in enumerate(schedule.orders):
        for action in order:
            end = _far_end(schedule, action, source, incoming=False)
            if end is not None:
                destination, tag = end
                places[source, destination, tag] = counts[source, destination]
                counts[source, destination] += 1
    return places


def _instruction(
    schedule: Schedule, action: Action, rank: int, places: _Places, meeting: Meeting | None
) -> Instruction:
    takes, gives = _hops(schedule.paths[action.microbatch], action, schedule.backward)
    receives, sends = (_far_end(schedule, action, rank, incoming=incoming) for incoming in (True, False))
    return Instruction(
        action,
        str(action),
        takes,
        gives,
        None if receives is None else Link(*receives, places[receives[0], rank, receives[1]]),
        None if sends is None else Link(*sends, places[rank, *sends]),
        () if meeting is None else tuple(each.microbatch for each in meeting.actions),
    )


def _hops(path: Path, action: Action, backward: bool) -> tuple[int | None, int | None]:
    if action.op is Op.L:
        return len(path.visits), len(path.visits) if backward else None
    if action.stage == DRIVER_STAGE:
        return (None, 0) if action.op is Op.F else (0, None)
    if action.op is Op.W:
        return None, None
    visit = path.stages.index(action.stage)
    return (visit, visit + 1) if action.op is Op.F else (visit + 1, visit)


def _far_end(schedule: Schedule, action: Action, rank: int, *, incoming: bool) -> tuple[int, int] | None:
    """Return the other rank and the tag of the message that an action takes or gives; None when none travels.

    The tensor of hop h goes from rank hops()[h] to hops()[h + 1]; its gradient the other way.
    """
    path = schedule.paths[action.microbatch]
    takes, gives = _hops(path, action, schedule.backward)
    hop = takes if incoming else gives
    if hop is None:
        return None
    forward = action.op is Op.F or (incoming and action.op is Op.L)
    ranks = path.hops()
    source, destination = (ranks[hop], ranks[hop + 1]) if forward else (ranks[hop + 1], ranks[hop])
    if source == destination:
        return None
    tag = (action.microbatch * (schedule.num_stages + 1) + hop) * 2 + (not forward)
    return (source if incoming else destination), tag
