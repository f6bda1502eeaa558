"""Every message between ``skippipe run`` and the driver that it has started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..engine.control.codec import Control, Vocabulary


@dataclass(frozen=True, slots=True)
class Begin(Control):
    """The driver is here."""


@dataclass(frozen=True, slots=True)
class AskStore(Control):
    """Say where the job's store is."""


@dataclass(frozen=True, slots=True)
class StartWorkers(Control):
    """Start worker processes that look the driver's address up."""

    count: int
    key: str
    """Where in the store the address is."""
    environment: Mapping[str, str]
    folder: str


@dataclass(frozen=True, slots=True)
class AskWorkers(Control):
    """Say which workers live, and which have ended."""


@dataclass(frozen=True, slots=True)
class KillWorker(Control):
    """End a worker at once."""

    pid: int


@dataclass(frozen=True, slots=True)
class ForgetEnded(Control):
    """Forget the workers that have ended."""


@dataclass(frozen=True, slots=True)
class Obeyed(Control):
    """It is done."""


@dataclass(frozen=True, slots=True)
class StoreAt(Control):
    """Where the job's store is."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Workers(Control):
    """The worker processes that were started and are not forgotten."""

    running: Sequence[int]
    """Process ids."""
    ended: Sequence[tuple[int, int]]
    """Process id and exit status."""


@dataclass(frozen=True, slots=True)
class CannotDo(Control):
    """It was tried, and failed; the supervisor goes on."""

    reason: str


TO_SUPERVISOR: Final = Vocabulary("supervisor", [Begin, AskStore, StartWorkers, AskWorkers, KillWorker, ForgetEnded])
"""What a driver sends."""
TO_SUPERVISED: Final = Vocabulary("driver under a supervisor", [Obeyed, StoreAt, Workers, CannotDo])
"""What the supervisor sends."""
