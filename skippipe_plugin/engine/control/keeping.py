"""What is said of a worker's copy of the driver's own state, and of what the last driver has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..channel import Buffer
from .codec import Control
from .values import Record, RecordEntry, Stand, StepOrder, What


@dataclass(frozen=True, slots=True)
class Prepare(Control):
    """Say when all that came before is done: the gradients of an optimizer step are whole."""

    stand: Stand
    """That step."""


@dataclass(frozen=True, slots=True)
class Store(Control):
    """Keep a part of what the driver itself holds."""

    record: Record
    quiet: bool
    """Whether no answer is wanted."""
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Settle(Control):
    """Everything of this driver stands: forget what the last one has left."""

    stand: Stand
    """Which optimizer step was done last."""


@dataclass(frozen=True, slots=True)
class AskRecords(Control):
    """Send all records of this driver."""


@dataclass(frozen=True, slots=True)
class LetGo(Control):
    """Everybody holds what the driver has ordered: forget what was held before."""


@dataclass(frozen=True, slots=True)
class NoteEstimates(Control):
    """Some blocks were rebuilt by the driver."""

    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Drop(Control):
    """Others hold everything: forget all."""


@dataclass(frozen=True, slots=True)
class EndRun(Control):
    """The run of this generation is over for who sends this; over for every driver, all that is held may go."""

    generation: int


@dataclass(frozen=True, slots=True)
class AskSummary(Control):
    """Say what is left of the last driver."""


@dataclass(frozen=True, slots=True)
class AskRecord(Control):
    """Send one record of the last driver."""

    name: str


@dataclass(frozen=True, slots=True)
class GetRetained(Control):
    """Send what belongs to blocks in one part of what the last driver has left."""

    part: int
    what: What
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class FinishStep(Control):
    """Take the optimizer step that the last driver was about to command, where it is due and has not been taken."""

    order: StepOrder
    fit: int
    settings: Buffer


@dataclass(frozen=True, slots=True)
class Retain(Control):
    """Keep what the last driver has left until :class:`Settle`."""


# ------------------------------------------------------------------ the answers


@dataclass(frozen=True, slots=True)
class Kept(Control):
    """What was commanded of what is kept is done."""


@dataclass(frozen=True, slots=True)
class Stored(Control):
    """The names of all records that are kept of this driver, or of ends of fits."""

    records: Sequence[str]


@dataclass(frozen=True, slots=True)
class Records(Control):
    """All records of this driver, packed."""

    records: Sequence[RecordEntry]
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of what is left of the last driver."""

    blocks: Sequence[int]
    stand: Stand
    """The last optimizer step that they have taken."""
    whole: Stand
    """The optimizer step whose gradients are here, whole, whether it was taken or not."""


@dataclass(frozen=True, slots=True)
class Summary(Control):
    """What is left of the last driver."""

    parts: Sequence[Part]
    records: Mapping[str, tuple[int, int]]
    """By name: fit and optimizer step."""
    results: Sequence[int]
    """The fits whose end is kept."""


@dataclass(frozen=True, slots=True)
class OneRecord(Control):
    """A record."""

    record: Record
    blobs: Sequence[Buffer]
