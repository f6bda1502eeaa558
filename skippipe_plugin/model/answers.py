"""What is known about a kind of step, as far as it was asked (:mod:`.asking`), and the clock that it may read."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Any, Final

from .counting import Constant, Watch, Weighting
from .flips import Flip
from .outstanding import Outstanding
from .reductions import Plan
from .resized import Sizes
from .traces import SideAxes
from .trials import Key

GRADIENTS: Final = "the gradients of parameters"
"""A hand of the clock: they are others with every batch."""


class Clock:
    """What steps read that tells where training is; by itself it has no hands."""

    fast: frozenset[str] = frozenset()
    """The hands that move with every batch."""

    def __init__(self) -> None:
        self.reads: set[str] = set()
        """The names of the hands that steps which are asked have read."""

    def shows(self, names: Collection[str]) -> Hashable:
        """Return what some of the hands show."""
        return tuple(sorted(names))

    def batch_index(self, number: Any) -> Any:
        """Return the number of a batch, as a step that is asked gets it."""
        return number


@dataclass(slots=True)
class Answer:
    """What is known about a kind of step."""

    plans: dict[Key, Plan] = field(default_factory=dict)
    failure: str = ""
    """How a microbatch fails where the batch does not."""
    crossing: str = ""
    """How microbatches that take turns see each other."""
    watch: Watch = field(default_factory=Watch)
    outstanding: Outstanding = field(default_factory=Outstanding)
    constants: set[Constant] = field(default_factory=set)
    metrics: set[str] = field(default_factory=set)
    """The torchmetrics that microbatches leave with other counts than the batch."""
    read: str = ""
    """What the step reads that tells where training is, and is another with every batch."""
    left: str = ""
    """What microbatches leave in an attribute, a buffer or a global name that is another after the batch."""
    blocks: str | None = None
    """What the blocks make otherwise of microbatches than of the batch; None before they were asked."""
    hooks: bool = False
    """Whether the step itself registers forward hooks on blocks, and removes them."""
    flips: tuple[Flip, ...] = ()
    """Comparisons that came out alike for all samples when the step was asked first."""
    takes_course: bool = False
    """Whether it may do otherwise by values of its batch."""
    sizes: Sizes = field(default_factory=Sizes)
    axes: SideAxes = field(default_factory=SideAxes)
    """What is known of the side inputs that carry a gradient."""
    tells: bool = False
    """Whether a batch was asked about whose loss is a number, and another one than 0, as it is without labels."""
    lacked: set[Weighting] = field(default_factory=set)
    """What means may be over, of which a batch that was asked about had nothing."""
    counts_samples: bool = False
    """Whether no result is a mean over anything but samples, so that its rules say the same of every batch."""
    num_asked: int = 0
    num_plain: int = 0
    """So many batches since held neither labels nor anything like a mask."""

    odd: dict[str, str] = field(default_factory=dict)
    """What else of the batch does not follow from the microbatches', and why; not to be seen in any one result."""
    problems: dict[str, str] = field(default_factory=dict)
    """By name of a result: why it follows from the microbatches' by no rule."""
    is_told: bool = False
    """Whether the user has been told of the problems."""

    @property
    def is_hopeless(self) -> bool:
        """Whether batches cannot be cut, for what was found out."""
        return self.has_no_rule or bool(self.failure or self.hooks)

    @property
    def has_no_rule(self) -> bool:
        """Whether that holds for other steps of the kind, too, whatever is another for them."""
        return bool(self.read or self.crossing or self.left or self.blocks or self.problems)
