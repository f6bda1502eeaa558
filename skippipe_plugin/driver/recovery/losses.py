"""How often workers may be lost before a run ends, and the story that is told then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from ...engine.errors import ConnectionsBroken, SkipPipeError
from ..links import Link

_MAX_JOIN_DEATHS: Final = 2
"""How often the replacement of one worker may die before it has taken over."""
_MAX_BREAKS_OF_PAIR: Final = 3
"""How often connections of the same two ranks may break before one of them is replaced."""
MAX_LOSSES: Final = 5
"""How often the worker of one rank may be lost without a finished attempt in between."""


class Losses:
    """Who was lost at which rank since something was finished last: not for ever."""

    def __init__(self) -> None:
        self._num_breaks = 0
        self._ends: tuple[int, ...] = ()
        self._parted: Counter[frozenset[int]] = Counter()
        self._how: dict[int, list[str]] = {}
        self._deaths: Counter[int] = Counter()

    def forget(self) -> None:
        """Note that something was finished."""
        self._num_breaks = 0
        self._ends = ()
        self._parted.clear()
        self._how.clear()
        self._deaths.clear()

    def note_break(self, error: ConnectionsBroken) -> None:
        """Count connections that broke between living ranks.

        Raises:
            ConnectionsBroken: There were too many.
        """
        self._num_breaks += 1
        self._ends = error.ends or self._ends  # where nobody knows it is taken to be as before
        self._parted[frozenset(self._ends)] += 1
        if self._num_breaks > MAX_LOSSES:
            raise ConnectionsBroken(
                f"connections between the workers broke {self._num_breaks} times, and nothing was finished in between; "
                "look at what is between their hosts (firewall, address translation)"
            ) from error

    def parted(self) -> tuple[int, ...]:
        """Return the two ranks whose connection has broken again and again, if it has; then they begin anew."""
        ends = self._ends
        if not ends or self._parted[frozenset(ends)] < _MAX_BREAKS_OF_PAIR:
            return ()
        self._parted.clear()
        self._num_breaks = 0
        return ends

    def note(self, link: Link, *, took_over: bool, error: BaseException) -> None:
        """Count a loss.

        Raises:
            SkipPipeError: There were too many.
        """
        rank, where = link.rank, f"worker rank {link.rank} (stage {as_text(link.stages)})"
        self._how.setdefault(rank, []).append(link.how_lost)
        self._deaths[rank] += not took_over
        story = "; ".join(self._how[rank])
        if self._deaths[rank] >= _MAX_JOIN_DEATHS:
            raise SkipPipeError(
                f"{self._deaths[rank]} replacements of {where} died before they had taken over ({story}); look at the "
                "log of the worker's host (memory?), then start again"
            ) from error
        if len(self._how[rank]) > MAX_LOSSES:
            raise SkipPipeError(
                f"{len(self._how[rank])} workers of {where} were lost one after the other, and nothing was finished in "
                f"between ({story}); look at the log of the worker's host (memory?), then start again"
            ) from error


def as_text(stages: Sequence[int]) -> str:
    """List stages."""
    return ", ".join(map(str, stages))
