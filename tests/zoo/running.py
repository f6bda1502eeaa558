"""Train an entry of the zoo: in one process, in a pipeline, or in one process that follows a pipeline's paths."""

from __future__ import annotations

from typing import Any

from skippipe_plugin.strategies import PathConfig
from tests.e2e.emulation import Watch
from tests.e2e.support import Run, train

from .entries import Entry
from .following import Following

BATCH = 10  # microbatches of 3, 3, 2, 2
SAMPLES = 26  # and a last batch that is smaller
NUM_MICROBATCHES = 4


def run(entry: Entry, workers: int, *callbacks: Any, samples: int = SAMPLES, **strategy: Any) -> Run:
    """Train for an epoch; without workers in one process."""
    return train(
        entry.make,
        entry.loader(samples, BATCH),
        1 + workers,
        {"num_microbatches": NUM_MICROBATCHES, "blocks": entry.blocks, **strategy} if workers else None,
        max_steps=-1,
        max_epochs=1,
        callbacks=[*entry.callbacks(), *callbacks],
    )


def run_skipping(entry: Entry, workers: int, costs: str = "uniform", **strategy: Any) -> tuple[Run, Run]:
    """Train with a third of the stages skipped, and in one process that follows the same paths."""
    watch = Watch()
    found = run(entry, workers, watch, skip_ratio=1 / 3, paths=PathConfig(costs=costs), **strategy)
    assert all(len(path.visits) < workers for path in watch.schedules[-1].paths)
    return found, run(entry, 0, Following(watch.schedules, entry.blocks, trees=entry.trees))
