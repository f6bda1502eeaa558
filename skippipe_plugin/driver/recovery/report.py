"""What is told of a loss."""

from __future__ import annotations

from dataclasses import dataclass

from .neighbours import EXPLAINED, Origin, Source


@dataclass(frozen=True, slots=True)
class RecoveryEvent:
    """A worker was lost (or left) and its stages have a new one."""

    rank: int
    stages: tuple[int, ...]
    how_lost: str
    source: Source
    seconds: float
    """From when the loss was noticed to when the stage was whole again."""
    steps_around: int
    """How many training steps ran meanwhile without the worker."""
    origins: tuple[Origin, ...] = ()
    """What exactly each stage was rebuilt from, where it was rebuilt from others."""
    batches_repeated: int = 0
    """How many batches since the last optimizer step are run once more for the gradients that it had accumulated."""

    def __str__(self) -> str:
        stages = ", ".join(map(str, self.stages))
        exactly = f" ({'; '.join(map(str, self.origins))})" if self.origins else ""
        repeated = (
            f"; batches since the last optimizer step that are repeated for its gradients: {self.batches_repeated}"
            if self.batches_repeated
            else ""
        )
        return (
            f"worker rank {self.rank} (stage {stages}) was lost: {self.how_lost}. A new worker took over after "
            f"{self.seconds:.2f} s and {self.steps_around} steps without it; its weights: {EXPLAINED[self.source]}"
            f"{exactly}{repeated}"
        )
