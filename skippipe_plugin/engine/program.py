"""A schedule as one rank reads it: its actions in order, each with the links it receives from and sends to."""

from __future__ import annotations

from dataclasses import dataclass

from ..schedule import DRIVER_STAGE, Action, Op, Path, Schedule


@dataclass(frozen=True, slots=True)
class Link:
    """The far end of a message and the tag that both ends derive from the schedule."""

    rank: int
    tag: int


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

    @property
    def microbatch(self) -> int:
        """The microbatch it works on."""
        return self.action.microbatch


def compile_program(schedule: Schedule, rank: int) -> tuple[Instruction, ...]:
    """Return the instructions of ``rank``, in the order of the schedule."""
    stride = max((len(path.visits) for path in schedule.paths), default=0) + 1
    return tuple(_instruction(schedule, action, rank, stride) for action in schedule.orders[rank])


def _instruction(schedule: Schedule, action: Action, rank: int, stride: int) -> Instruction:
    path = schedule.paths[action.microbatch]
    takes, gives = _hops(path, action, schedule.backward)
    forward_in = action.op in (Op.F, Op.L)
    forward_out = action.op is Op.F
    return Instruction(
        action,
        str(action),
        takes,
        gives,
        None if takes is None else _link(path, takes, forward_in, action.microbatch, stride, rank, incoming=True),
        None if gives is None else _link(path, gives, forward_out, action.microbatch, stride, rank, incoming=False),
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


def _link(
    path: Path, hop: int, forward: bool, microbatch: int, stride: int, rank: int, *, incoming: bool
) -> Link | None:
    """The tensor of hop h goes from rank hops()[h] to hops()[h + 1]; its gradient the other way."""
    ranks = path.hops()
    source, destination = (ranks[hop], ranks[hop + 1]) if forward else (ranks[hop + 1], ranks[hop])
    if source == destination:
        return None
    return Link(source if incoming else destination, ((microbatch * stride) + hop) * 2 + (not forward))
