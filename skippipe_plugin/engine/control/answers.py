"""What a worker answers.

Answers to what changes the pipeline go to every driver, so that all know the same; answers to questions go to who has
asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..channel import Buffer
from .codec import Control
from .values import ExpertCost, Loads, TensorEntry, Writes


@dataclass(frozen=True, slots=True)
class Ready(Control):
    """What was commanded is done."""


@dataclass(frozen=True, slots=True)
class Warmed(Control):
    """An idle worker has imported what it will need."""


@dataclass(frozen=True, slots=True)
class LinkCosts(Control):
    """What was measured: first and second rank, latency and bandwidth."""

    costs: Sequence[tuple[int, int, float, float]]


@dataclass(frozen=True, slots=True)
class ClockReads(Control):
    """What the worker's clock reads."""

    now: float


@dataclass(frozen=True, slots=True)
class Tapped(Control):
    """What the driver's hooks are to see of a stage's forward."""

    step: int
    microbatch: int
    stage: int
    tensors: Sequence[TensorEntry]
    requires_grad: Sequence[bool]
    events: Buffer
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class SideGradients(Control):
    """The gradients that came to side inputs in a stage; an entry's name is the slot."""

    step: int
    microbatch: int
    stage: int
    tensors: Sequence[TensorEntry]
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Done(Control):
    """A step is done: its gradients are complete."""

    step: int
    timeline: Sequence[tuple[str, float, float]]
    """Action, start and end, of a step that is recorded."""
    writes: Writes
    loads: Loads
    shared: Sequence[TensorEntry] = ()
    """What the copies here of the driver's tensors have gathered, for the first driver; a name is a number."""
    in_half: Sequence[int] = ()
    """The numbers of those whose gradients are computed in float16."""
    blobs: Sequence[Buffer] = ()


@dataclass(frozen=True, slots=True)
class NormPowers(Control):
    """The answer to :class:`AskNorm`."""

    number: int
    power: float
    experts: float
    """The part of it from experts that only this worker holds."""


@dataclass(frozen=True, slots=True)
class Unscaled(Control):
    """The answer to :class:`Unscale <skippipe_plugin.engine.control.commands.Unscale>`."""

    number: int
    overflowed: bool | None
    """Whether some gradient is infinite or no number; None where there is none."""


@dataclass(frozen=True, slots=True)
class State(Control):
    """What belongs to blocks; of the optimizer the first blob is what is no tensor."""

    norms: Sequence[tuple[int, float]]
    """By stage: the norm of its last gradient."""
    estimates: Sequence[int]
    """The blocks that were rebuilt from others and have not taken an optimizer step since."""
    stages: Sequence[tuple[int, Sequence[int]]]
    """Each with its blocks."""
    tensors: Sequence[TensorEntry]
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Probed(Control):
    """What a block did, or the exception that it raised, with its traceback."""

    traceback: str | None
    result: Buffer


@dataclass(frozen=True, slots=True)
class PartsCompared(Control):
    """The answer to :class:`CompareParts`."""

    difference: str


@dataclass(frozen=True, slots=True)
class RouterNews(Control):
    """What routers did, if it was to be taken, and the biases that no model saves."""

    statistics: Mapping[str, tuple[Sequence[int], int, int, float, Sequence[float] | None]]
    """By router: loads, tokens, empty slots, entropy, quantiles."""
    biases: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class ExpertNews(Control):
    """What experts took since the last time."""

    measured: Sequence[ExpertCost]


@dataclass(frozen=True, slots=True)
class Failed(Control):
    """An exception; of an aborted generation it is only the echo of somebody else's."""

    aborted: bool
    traceback: str
    awaited: int = -1
    """The rank whose connection broke while it was waited for, where that is known."""
    given_up_by: int = -1
    """The driver that has given the generation up, if one had."""
    exception: Buffer = b""
