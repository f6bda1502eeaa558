"""How a worker comes and goes, and how both ends see that the other one lives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..channel import Buffer
from ..device import NOWHERE, Place
from ..traffic import Transfer
from .codec import Control


@dataclass(frozen=True, slots=True)
class Outlive(Control):
    """Wait for the next driver, whose address will be in a store, when this one is lost."""

    stores: Sequence[tuple[str, int]]
    """The job's, and those of supervisors that stand by on other hosts: the first one that is there counts."""
    key: str
    """Where in it the address is."""
    number: int
    """Of the list of members, which a supervisor that stands by may know less well."""
    names: Sequence[str]
    """The workers that joined by hand, the members."""


@dataclass(frozen=True, slots=True)
class Release(Control):
    """The driver's call is over: return from yours."""

    results: Buffer


@dataclass(frozen=True, slots=True)
class Exit(Control):
    """End."""


@dataclass(frozen=True, slots=True)
class Refuse(Control):
    """The driver does not take you (any more); the channel ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Beat(Control):
    """A question for a sign of life, and the sign."""

    turn: int = 0
    """In an answer: as :attr:`skippipe_plugin.engine.waiting.Waiting.turn`."""
    is_quiet: bool = False
    """In an answer: whether nothing is on its way to or from a process that waits."""


@dataclass(frozen=True, slots=True)
class AskProgress(Control):
    """A question for what is waited for, and whether these transfers were begun."""

    transfers: Sequence[Transfer]


@dataclass(frozen=True, slots=True)
class Progress(Control):
    """The answer to :class:`AskProgress`."""

    turn: int
    """As :attr:`skippipe_plugin.engine.waiting.Waiting.turn`."""
    awaited: Transfer | None = None
    """What it waits for, if that is one."""
    ranks: Sequence[int] = ()
    """Who has to begin that too."""
    num_moved: int = 0
    """As :meth:`skippipe_plugin.engine.traffic.Traffic.num_moved`."""
    begun: Sequence[Transfer] = ()
    """Those of the transfers that this rank has begun."""


@dataclass(frozen=True, slots=True)
class Hello(Control):
    """The first message."""

    versions: Mapping[str, str]
    pid: int | None = None
    rank: int = -1
    """What a launcher calls it, or what the first driver does."""
    name: str = ""
    """What one that joined by hand calls itself."""
    ticket: str = ""
    """What its source calls it, where another source than the driver's own host has given it."""
    place: Place = NOWHERE
    """Where it is, and what it may compute on there."""


@dataclass(frozen=True, slots=True)
class Leave(Control):
    """It wants to be relieved of its stages."""
