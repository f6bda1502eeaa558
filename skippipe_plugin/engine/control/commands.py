"""What a driver says to a worker while it trains.

Commands come from the first driver; :class:`Step` (with the first calls in it), :class:`Calls`, :class:`Probe` and
:class:`CompareParts` from each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..channel import Buffer
from .codec import Control
from .values import (
    CallNews,
    ExpertShare,
    Loads,
    Opening,
    PackedBlocks,
    Parts,
    Prints,
    Stand,
    StepOrder,
    TensorEntry,
    What,
    Written,
    Zero,
)


@dataclass(frozen=True, slots=True)
class Configure(Control):
    """Form the groups of a generation."""

    generation: int
    rank: int
    members: Sequence[int]
    store_host: str
    store_port: int
    other_drivers: Sequence[tuple[str, int]]
    may_leave: bool
    """Whether somebody would take over what a worker holds that leaves."""
    sys_path: Sequence[str]
    num_threads: int
    device: str
    backend: Literal["gloo", "gloo-pairs", "nccl"]
    replica_groups: Sequence[tuple[int, Sequence[int]]]
    """Stages that several ranks hold, with these."""
    expert_sets: Sequence[tuple[int, Sequence[Sequence[int]]]]
    """Stages whose experts are spread, with the sets of ranks that share them."""
    schedules: Mapping[str, str]
    step: int


@dataclass(frozen=True, slots=True)
class UseSchedule(Control):
    """Run the following steps of a name by another schedule."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class MeasureLinks(Control):
    """Measure the links to the other ranks."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Abort(Control):
    """Give up what is under way in a generation."""

    generation: int
    counts: bool = False
    """Whether what its forwards have left in the blocks stays."""


@dataclass(frozen=True, slots=True)
class AskClock(Control):
    """Say what your clock reads."""


# ------------------------------------------------------------------ a driver: blocks


@dataclass(frozen=True, slots=True)
class Load(Control):
    """Take a stage over at the start of a run."""

    stage: int
    seed: int
    first: bool
    """Whether this is the first of the worker's stages: it forgets those of an earlier run."""
    last: bool
    overlap: int | str
    blocks: PackedBlocks
    classes: Prints
    experts: Sequence[ExpertShare]
    compile: Buffer
    """How blocks are compiled, packed."""
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Warm(Control):
    """Import what some stage will need."""

    sys_path: Sequence[str]
    blocks: PackedBlocks
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Arrange(Control):
    """Hold these stages from now on, of blocks that are kept and blocks that come."""

    stages: Sequence[tuple[int, Sequence[int], Sequence[ExpertShare]]]
    keep: Sequence[int]
    classes: Prints
    overlap: int | str
    norms: Sequence[tuple[int, float]]
    """By stage: the norm of its last gradient."""
    estimates: Sequence[int]
    """The blocks that come which were rebuilt from others."""
    stand: Stand
    """The last optimizer step that all of it has taken."""
    parts: Parts
    """What comes."""
    compile: Buffer
    """How blocks are compiled, packed."""
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Get(Control):
    """Send what belongs to blocks; None: to all that are held."""

    what: What
    blocks: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Overwrite(Control):
    """Overwrite weights or gradients before the next command: the other drivers have written the same."""

    what: Written
    tensors: Sequence[TensorEntry]
    absent: Sequence[str]
    """The parameters that have no gradient any more."""
    zero: Zero
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Share(Control):
    """Overwrite the copies of tensors that the driver has, before the next command; an entry's name is a number."""

    copies: Mapping[str, Sequence[str]]
    """By that number: the names of the copies that are here."""
    tensors: Sequence[TensorEntry]
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Probe(Control):
    """Say what a block makes of its input, without a trace."""

    question: Buffer


@dataclass(frozen=True, slots=True)
class CompareParts(Control):
    """Say whether a block makes the same of parts of the batch as of all of it."""

    question: Buffer


# ------------------------------------------------------------------- a driver: steps


@dataclass(frozen=True, slots=True)
class Step(Control):
    """A driver's part of a step begins, with the first of its calls."""

    opening: Opening
    news: CallNews
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Calls(Control):
    """Further calls of a step."""

    news: CallNews
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Pulled(Control):
    """The gradients of what hooks on the driver have seen of a stage's forward."""

    step: int
    microbatch: int
    stage: int
    tensors: Sequence[TensorEntry]
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Merge(Control):
    """Add the step's gradients to the accumulated ones; measure their norm if that is expected to be asked for."""

    scale: float
    zero: Zero
    stage_scales: Sequence[tuple[int, float]]
    norm: AskNorm | None


@dataclass(frozen=True, slots=True)
class AskNorm(Control):
    """Measure the accumulated gradients."""

    number: int
    """Comes back with the answer: that of a step that was not clipped must not be taken for that of a later one."""
    norm_type: float
    stepped: bool
    """Whether only what the optimizer steps counts."""


@dataclass(frozen=True, slots=True)
class Clip(Control):
    """Zero and clip what is accumulated."""

    scale: float | None
    value: float | None
    zero: Zero


@dataclass(frozen=True, slots=True)
class Unscale(Control):
    """Multiply what the optimizer steps, as a loss scaler does before a step, and say whether all of it is finite."""

    number: int
    """Comes back with the answer."""
    inverse: float
    norm: AskNorm | None
    """What is to be measured afterwards, if a norm is expected to be asked for."""


@dataclass(frozen=True, slots=True)
class Pass(Control):
    """This driver has come to the first one's next command."""


# --------------------------------------------------------------- a driver: optimizers


@dataclass(frozen=True, slots=True)
class BuildOptimizer(Control):
    """Build the optimizer anew; its state starts empty."""

    plan: Buffer


@dataclass(frozen=True, slots=True)
class PutOptimizerState(Control):
    """Overwrite the optimizer's state."""

    tensors: Sequence[TensorEntry]
    blobs: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class StepOptimizer(Control):
    """Step the optimizer."""

    order: StepOrder
    settings: Buffer


@dataclass(frozen=True, slots=True)
class SwitchOptimizer(Control):
    """Call ``train`` or ``eval`` of an optimizer that has two sets of weights."""

    method: Literal["train", "eval"]
    settings: Buffer


# ------------------------------------------------------------------ a driver: experts


@dataclass(frozen=True, slots=True)
class AskRouters(Control):
    """Set the routers' biases, and update them by loads; say what the routers did if that is to be taken."""

    take: bool = False
    biases: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rule: str = ""
    rate: float = 0.0
    loads: Loads = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoveExperts(Control):
    """Move experts, and say what those here took since the last time."""

    moves: Sequence[tuple[int, str, Sequence[int]]]
    """Block, name, placement."""
