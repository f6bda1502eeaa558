"""Finds links on which nothing moves: one end waits for what the other one has sent, and both live.

Nothing here depends on how long actions take, since both ends have done their part when this begins to count; nor on
other drivers, since two ends suffice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ...engine.control.presence import Progress
from ...engine.traffic import Transfer

_State = tuple[int, Transfer | None, int]


@dataclass(frozen=True, slots=True)
class DeadLink:
    """Ranks between which nothing moves."""

    waiting: int
    """Who waits."""
    sender: int
    """For whom."""


class DeadLinks:
    """Looks at what ranks say, again and again.

    Args:
        patience: In how many looks nothing may have moved.
    """

    def __init__(self, patience: int) -> None:
        self._patience: Final = patience
        self._states: dict[int, _State] = {}
        self._times: dict[int, int] = {}
        self._awaited: dict[int, Progress] = {}
        """What each rank has said last."""
        self.suspect: DeadLink | None = None
        """Where nothing has moved since the last look."""

    def transfers_of(self, rank: int) -> list[Transfer]:
        """Return what others wait for, of which a rank should say whether it has begun it."""
        said = (each for each in self._awaited.values() if rank in each.ranks)
        return [each.awaited for each in said if each.awaited is not None]

    def look(self, said: Mapping[int, Progress]) -> DeadLink | None:
        """Take what ranks say, those of whom it is known; return the link on which nothing has moved for so long."""
        self.suspect = None
        for rank, progress in said.items():
            state = (progress.turn, progress.awaited, progress.num_moved)
            if self._states.get(rank) != state or not progress.num_moved:
                self._states[rank], self._times[rank] = state, 0
            elif self._is_proved(progress, said):
                self._times[rank] += 1
                self.suspect = DeadLink(rank, progress.ranks[0])
                if self._times[rank] >= self._patience:
                    return self.suspect
        self._awaited |= said
        return None

    def forget(self) -> None:
        """Begin anew."""
        self._states.clear()
        self._awaited.clear()
        self.suspect = None

    @staticmethod
    def _is_proved(progress: Progress, said: Mapping[int, Progress]) -> bool:
        """Whether all others have done their part in what a rank waits for."""
        others = [said.get(rank) for rank in progress.ranks]
        return bool(others) and all(each is not None and progress.awaited in each.begun for each in others)
