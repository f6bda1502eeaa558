"""Which blocks make which stage, and which ranks hold it."""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

from ..engine.call import Form
from ..engine.transport import TensorSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a pipeline: drivers first, then workers."""

    num_drivers: int
    stage_blocks: tuple[range, ...]
    """By block stage, from stage 1 on: its blocks' numbers in the stack."""
    placement: tuple[tuple[int, ...], ...]
    """By stage, the drivers' stage 0 first: the ranks that hold it."""
    expert_parallel: int = 1
    """Over how many of a stage's replicas its experts are spread."""

    @property
    def size(self) -> int:
        """The number of ranks."""
        return 1 + max(rank for ranks in self.placement for rank in ranks)

    @property
    def drivers(self) -> range:
        """The ranks that run a Trainer."""
        return range(self.num_drivers)

    @property
    def workers(self) -> range:
        """The ranks that hold stages only."""
        return range(self.num_drivers, self.size)

    @property
    def num_blocks(self) -> int:
        """The number of blocks in the stack."""
        return self.stage_blocks[-1].stop

    def blocks(self, stage: int) -> range:
        """Return the blocks of a block stage."""
        return self.stage_blocks[stage - 1]

    def stages_of(self, rank: int) -> list[int]:
        """Return the block stages that ``rank`` holds."""
        return [stage for stage, ranks in enumerate(self.placement) if stage and rank in ranks]

    def stage_of_block(self, block: int) -> int:
        """Return the stage that ``block`` belongs to."""
        return next(stage for stage, blocks in enumerate(self.stage_blocks, start=1) if block in blocks)

    def hosted(self, rank: int) -> list[int]:
        """Return the blocks that ``rank`` holds, in order."""
        return [block for stage in self.stages_of(rank) for block in self.blocks(stage)]

    def shaping_stages(
        self, forms: Sequence[TensorSpec] | Sequence[Form], needed: Collection[int] = ()
    ) -> tuple[int, ...]:
        """Return the stages that every path must visit.

        Args:
            forms: Around the blocks: of what crosses there, whose shapes or types a stage may change.
            needed: Blocks that every path runs: code after the stack uses what they return, or another stack begins.
        """
        stages = enumerate(self.stage_blocks, start=1)
        return tuple(
            stage
            for stage, blocks in stages
            if not forms[blocks.start].is_like(forms[blocks.stop]) or any(block in needed for block in blocks)
        )

    @property
    def replica_groups(self) -> list[tuple[int, tuple[int, ...]]]:
        """The stages that several workers hold, with their ranks."""
        return [
            (stage, ranks)
            for stage, ranks in enumerate(self.placement)
            if stage and len(ranks) > 1 and ranks[0] >= self.num_drivers
        ]

    @property
    def replicated_blocks(self) -> frozenset[int]:
        """The blocks that several workers hold."""
        return frozenset(block for stage, _ in self.replica_groups for block in self.blocks(stage))

    @property
    def expert_sets(self) -> list[tuple[int, list[tuple[int, ...]]]]:
        """The stages whose experts are spread, with the sets of ranks of which each holds all experts together."""
        size = self.expert_parallel
        return [
            (stage, [ranks[first : first + size] for first in range(0, len(ranks), size)])
            for stage, ranks in self.replica_groups
            if size > 1
        ]

    def position(self, rank: int) -> int:
        """Return the place of ``rank`` in its set; ranks at the same place hold the same experts."""
        return next((ranks.index(rank) for _, sets in self.expert_sets for ranks in sets if rank in ranks), 0)

    def whole_set(self, stage: int, present: Container[int]) -> tuple[int, ...]:
        """Return the ranks that together hold all of ``stage``, or as much of it as is present."""
        sets = dict(self.expert_sets).get(stage, [(rank,) for rank in self.placement[stage]])
        there = [tuple(rank for rank in ranks if rank in present) for ranks in sets]
        return max(there, key=len, default=())


def device_counts(devices: int, *, replicas: int, drivers: int, driver_stage: bool) -> int:
    """Return how many block stages ``devices`` processes make.

    Raises:
        ValueError: They do not fit, with the numbers that would.
    """
    workers = devices - drivers
    stages, rest = divmod(workers, replicas)
    if workers < (0 if driver_stage else replicas) or rest:
        smallest = drivers if driver_stage else drivers + replicas
        fitting = [
            drivers + count * replicas for count in (stages, stages + 1) if drivers + count * replicas >= smallest
        ]
        raise ValueError(
            f"devices={devices} does not fit drivers={drivers} and replicas={replicas}: devices (the processes) must "
            f"be drivers + stages x replicas, such as {' or '.join(map(str, fitting or [smallest]))}"
        )
    return stages + driver_stage
