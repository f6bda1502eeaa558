"""What is known of connections that broke, or on which nothing moves, though everybody lives: whose they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ..engine.control.answers import Failed
from ..engine.errors import ConnectionsBroken
from ..engine.waiting import Waiting


class Breaks:
    """Those of one generation.

    Args:
        waiting: This driver's, which knows its rank as soon as the generation forms.
        name: Names a rank that is a worker's; None for others.
    """

    def __init__(self, waiting: Waiting, name: Callable[[int], str | None]) -> None:
        self._waiting, self._name_of = waiting, name
        self._lock = threading.Lock()
        self._reports: list[tuple[int, int]] = []
        """Who has reported a break, and whom it was waiting for if that is known, in order."""
        self._given_up_by = -1
        """Another driver that has given the generation up, as workers say."""
        self._dead: tuple[int, int] | None = None

    @property
    def _rank(self) -> int:
        return 0 if self._waiting.traffic is None else self._waiting.traffic.rank

    @property
    def are_found(self) -> bool:
        """Whether the link was found on which nothing moves: then nothing has to be waited for to know the cause."""
        return self._dead is not None

    def note_dead(self, sender: int, waiting: int) -> None:
        """Note that one rank waits for what another one has sent, and nothing moves."""
        self._dead = sender, waiting

    def note(self, rank: int, failed: Failed) -> None:
        """Note what a worker says whose generation has ended."""
        with self._lock:
            self._reports.append((rank, failed.awaited))
            if failed.given_up_by not in (-1, self._rank):
                self._given_up_by = failed.given_up_by

    def error(self, awaited: Sequence[int] = ()) -> ConnectionsBroken:
        """Say whose connections broke; ``awaited`` are those whom this driver itself was waiting for."""
        if self._dead is not None:
            sender, waiting = self._dead
            return ConnectionsBroken(
                f"nothing comes from {self._name(sender)} to {self._name(waiting)}, though both live and it was sent: "
                "is the link between them cut, or was a message lost?",
                self._dead,
            )
        with self._lock:
            reports = list(self._reports)
        # Who is told that a generation was given up knows of nobody; who has seen a break knows for whom it waited.
        known = next(([rank, other] for rank, other in reports if other >= 0), None)
        if known is None and self._given_up_by >= 0:
            return ConnectionsBroken(
                f"driver {self._given_up_by} has given this step up, and says in its own output why; start the run "
                "again from the last checkpoint"
            )
        ranks = known or [*dict.fromkeys(rank for rank, _ in reports)][:2] or [self._rank, *awaited[:1]]
        names = [*map(self._name, ranks)]
        if not reports and not awaited:
            names.append("a worker")
        return ConnectionsBroken(
            f"a connection of {' and '.join(names)} broke, but no worker ended: was it reset on its way?",
            tuple(ranks) if known or not reports else (),
        )

    def apart(self, ranks: Sequence[int]) -> ConnectionsBroken:
        """Say that two ranks could not be connected, though all others were."""
        names = " and ".join(map(self._name, ranks))
        return ConnectionsBroken(f"{names} could not be connected with each other, but no worker ended.", tuple(ranks))

    def _name(self, rank: int) -> str:
        return self._name_of(rank) or ("the driver" if rank == self._rank else f"driver {rank}")
