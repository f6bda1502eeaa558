"""Moves experts between the replicas of a stage, where the measured loads and links say that it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from ..engine.control.answers import ExpertNews
from ..engine.control.commands import MoveExperts
from ..moe.migration import ExpertCosts, Move, plan_move
from ..moe.parallel import Placement
from ..schedule import NetworkCost
from .pipeline import Pipeline
from .shards import Site

_PROBE_BYTES: Final = 1 << 20


class ExpertMover:
    """Plans and makes moves of a pipeline's experts, between two steps."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Raise ValueError where no experts are spread."""
        if not pipeline.shards.placements:
            raise ValueError(
                "experts='placement' moves experts between replicas, and none are spread; use "
                "replicas=2 and moe=MoEConfig(expert_parallel=2), or leave 'placement' out"
            )
        self._pipeline = pipeline
        self._network: NetworkCost | None = None

    def plan(self, loads: Mapping[Site, Sequence[float]], steps: int) -> dict[Site, Move]:
        """Return the moves that pay; every driver calls this alike, and the first one's answer counts.

        Args:
            loads: Rows of each expert in a step, by layer.
            steps: Within how many steps a move must pay for itself.
        """
        pipeline = self._pipeline
        if self._network is None:
            self._network = pipeline.measure_links(_PROBE_BYTES)
        found: dict[Site, Move] = {}
        for site, costs in self._measured().items():
            if site in loads:
                move = plan_move(loads[site], pipeline.shards.placements[site], costs, steps)
                if move is not None:
                    found[site] = move
        return found

    def move(self, placements: Mapping[Site, Placement]) -> None:
        """Move experts, with the state of their optimizers; losses stay what they would have been."""
        if placements:
            self._ask([(block, path, placement) for (block, path), placement in placements.items()])
            self._pipeline.shards.placements |= placements

    def imbalance(self, loads: Mapping[Site, Sequence[float]]) -> float:
        """Return MaxVio of the ranks, not of the experts: the mean over layers of the busiest rank's excess."""
        placements = self._pipeline.shards.placements
        values = [_excess(each, placements[site]) for site, each in loads.items() if sum(each)]
        return sum(values) / max(1, len(values))

    def _measured(self) -> dict[Site, ExpertCosts]:
        """Ask what experts took since the last time; a layer's rows and seconds are summed over its ranks."""
        sums: dict[Site, list[float]] = {}
        for block, path, *values in (entry for answer in self._ask([]) for entry in answer.measured):
            rows, seconds, row_bytes, expert_bytes = values
            known = sums.setdefault((block, path), [0, 0.0, row_bytes, expert_bytes])
            known[0] += rows
            known[1] += seconds
        return {
            site: ExpertCosts(seconds / rows, int(row_bytes), int(expert_bytes), self._seconds_per_byte(site[0]))
            for site, (rows, seconds, row_bytes, expert_bytes) in sums.items()
            if rows
        }

    def _ask(self, moves: Sequence[tuple[int, str, Sequence[int]]]) -> list[ExpertNews]:
        if self._pipeline.leads:
            self._pipeline.links.broadcast(MoveExperts(moves))
        return list(self._pipeline.links.expect_all(ExpertNews).values())

    def _seconds_per_byte(self, block: int) -> np.ndarray:
        """Return the links within the first set of ranks that share the experts of ``block``."""
        layout, network = self._pipeline.layout, self._network
        assert network is not None
        stage = layout.stage_of_block(block)
        ranks = dict(layout.expert_sets)[stage][0]
        return np.array([[0.0 if a == b else 1 / network.bandwidth_Bps[a][b] for b in ranks] for a in ranks])


def _excess(loads: Sequence[float], placement: Placement) -> float:
    rows = np.bincount(np.asarray(placement), weights=np.asarray(loads, dtype=float))
    return float(rows.max() / rows.mean() - 1)
