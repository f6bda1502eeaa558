"""What several messages have in common, and the parts of those that have many fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

TensorEntry = tuple[str, Sequence[int], str, Sequence[int]]
"""Name, shape, dtype and order in memory of a tensor, whose bytes are a blob."""
PackedBlocks = tuple[Sequence[TensorEntry], Sequence[TensorEntry]]
"""The tensors of blocks that travel, and those that are on the meta device; the structure is the first blob."""
ExpertShare = tuple[int, str, Sequence[int], Sequence[str], int]
"""Which experts of a block are here: block, name, placement, tensors, position."""
Prints = Mapping[str, Mapping[str, str]]
"""What the classes of blocks are where they come from."""
Loads = Mapping[str, Sequence[int]]
"""By router: the visits of each expert."""
Zero = Literal["", "drop", "fill"]
"""How accumulated gradients are zeroed first, if they are."""
What = Literal["weights", "gradients", "last_gradients", "optimizer", "attributes", "standing"]
"""What of the blocks is asked for or sent."""
ExpertCost = tuple[int, str, int, float, int, int]
"""What experts took: block, name, rows, seconds, bytes of a row and of an expert."""
Written = Literal["weights", "gradients"]
"""What user code may write."""


@dataclass(frozen=True, slots=True)
class Writes:
    """What forwards of blocks have written in a step."""

    attributes: Sequence[tuple[int, tuple[int, str]]] = ()
    """By block: attributes of modules of it, if they were not reported before."""
    buffers: Sequence[tuple[int, str]] = ()
    """By block: the buffers that checkpoints have, those of BatchNorm aside."""


@dataclass(frozen=True, slots=True)
class States:
    """What a step wants of what the blocks keep from one forward to the next."""

    note: int = 0
    """The number under which that is noted. What has it already is brought back: the step begins again."""
    start: int = 0
    """The number of what it begins with, if any. What it leaves is then taken back."""
    oldest: int = 0
    """The least number that is still needed."""
    weights: Sequence[tuple[int, str]] = ()
    """The parameters (block, name) that forwards write."""
    evaluation: int = 0
    """The number of the evaluation that begins, if it may have to begin again; then what it has left is taken back."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What a step is, beside its calls."""

    program: str
    live: Sequence[int]
    """The microbatches of this driver that are not empty."""
    training: bool
    timeline: bool
    forget_caches: Sequence[int]
    zero: Zero = ""
    repeats: bool = False
    """Whether the batch runs once more for some of its gradients: what it counts in buffers is counted."""
    loads: Loads = field(default_factory=dict)
    """The visits of earlier batches of the same optimizer step."""
    scale: float = 1.0
    """What the batch's loss is scaled with."""
    states: States | None = None
    """What the step wants of the blocks' states; None: nothing in particular."""


@dataclass(frozen=True, slots=True)
class Lacking:
    """What the reader of calls lacks, and what it may forget."""

    caching: Sequence[int]
    """The microbatches whose use of caches comes as a blob."""
    specs: Sequence[int]
    """The numbers of the specs that come as blobs."""
    dropped_specs: Sequence[int]
    side_inputs: Sequence[TensorEntry]
    """Those that come as blobs, by digest."""
    dropped: Sequence[str]
    """The digests of side inputs that are not needed any more."""


@dataclass(frozen=True, slots=True)
class CallNews:
    """Calls of a step, by numbers and digests; the lists go together."""

    step: int
    microbatches: Sequence[int]
    specs: Sequence[int]
    """The numbers of their specs."""
    seeds: Sequence[int]
    digests: Sequence[Sequence[str]]
    """Of their side inputs."""
    lacking: Lacking | None
    """None when the reader has all that it needs."""


@dataclass(frozen=True, slots=True)
class StepOrder:
    """How an optimizer steps."""

    scale: float | None
    """What the gradients are multiplied with first."""
    value: float | None
    """What their elements are clipped to first."""
    zero: Zero
    keep: bool
    """Whether the gradients stay as they are until they are zeroed."""
    keep_norms: bool
    lr_factors: Sequence[tuple[int, float]]
    """By stage, where it is not 1."""
    step: int = -1
    """The number of the optimizer step, where they are numbered."""


@dataclass(frozen=True, slots=True)
class Stand:
    """How far something is in training; whatever stands elsewhere than the run was cut off from it."""

    fit: int = 0
    """Of the script, from 1; 0 where they are not numbered."""
    step: int = -1
    """The optimizer step."""


@dataclass(frozen=True, slots=True)
class Record:
    """A part of what the driver itself holds, as a worker keeps it."""

    name: str
    fit: int
    step: int
    lasting: bool
    """Whether it is kept beyond the fit."""
    entries: Sequence[TensorEntry]
    optimizer_step: StepOrder | None = None
    """The optimizer step that follows as soon as this is stored."""


RecordEntry = tuple[Record, int]
"""A record, and how many blobs are its."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What comes with blocks; the blobs of each follow each other in this order."""

    structure: PackedBlocks
    weights: Sequence[TensorEntry]
    gradients: Sequence[TensorEntry]
    optimizer: Sequence[TensorEntry]
    """Of its state."""
    attributes: Sequence[TensorEntry]
    """What forwards have written into them."""
    has_plan: bool
    """Whether what the optimizer is built from comes too."""
    records: Sequence[RecordEntry]
