"""Who holds what, what steps run, and who is there: one value, replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..schedule import Schedule
from .layout import Layout


class HasLayout(Protocol):
    """What knows the layout that counts at present."""

    @property
    def layout(self) -> Layout:
        """Which blocks and ranks make which stage."""


@dataclass(frozen=True, slots=True)
class Formation:
    """A membership of the engine's groups, or (without members) what the next one will have.

    >>> layout = Layout(1, (range(2), range(2, 4)), ((0,), (1, 3), (2, 4)))
    >>> Formation(layout, {}, members=(0, 1, 2, 3)).replica_groups
    [(1, [1, 3])]
    """

    layout: Layout
    schedules: Mapping[str, Schedule]
    """By name, around the ranks that are missing."""
    members: tuple[int, ...] = ()
    """The ranks that are there: all drivers, and the workers that are linked."""
    generation: int = -1

    @property
    def replica_groups(self) -> list[tuple[int, list[int]]]:
        """The stages that several ranks hold, with those of them that are there."""
        groups = self.layout.replica_groups
        present = [(stage, [rank for rank in ranks if rank in self.members]) for stage, ranks in groups]
        return [(stage, ranks) for stage, ranks in present if len(ranks) > 1]

    @property
    def expert_sets(self) -> list[tuple[int, list[tuple[int, ...]]]]:
        """The stages whose experts are spread and whose holders are all there, with the sets that share them."""
        return [
            (stage, sets)
            for stage, sets in self.layout.expert_sets
            if all(rank in self.members for ranks in sets for rank in ranks)
        ]
