"""What the planner of partial paths may do."""

from __future__ import annotations

from dataclasses import dataclass

from ..checked import COUNT, COUNT_OR_NONE, SHARE, checked
from ..schedule import PathConstraints


@checked(max_jump=COUNT, max_swaps=COUNT_OR_NONE, max_back=COUNT_OR_NONE, eval_skip_ratio=SHARE)
@dataclass(frozen=True, kw_only=True, slots=True)
class PathConfig:
    """What the planner of partial paths may do; the limits' defaults are those of the SkipPipe paper."""

    max_jump: int = 4
    """How many stages a visit may lie beyond the furthest one so far."""
    max_swaps: int | None = None
    """How many visits of a path may step back behind the furthest one so far; None: 2."""
    max_back: int = 1
    """The furthest single step back, in stages; 1 swaps neighbours only."""
    eval_skip_ratio: float = 0.0
    """The skip ratio of validation, test and predict."""
    costs: str = "measure"
    """Where the planner's costs come from: ``"measure"`` (the second training step; until then nothing is skipped),
    ``"uniform"`` (all stages and links alike, the same plan in every run), or the name of a cost model's JSON file."""
    seed: int = 0
    """Equal seeds and costs give equal plans."""

    def __post_init__(self) -> None:
        PathConstraints(max_jump=self.max_jump, max_swaps=self.max_swaps, max_back=self.max_back)  # raises ValueError
