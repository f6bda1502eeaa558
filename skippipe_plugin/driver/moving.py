"""Move blocks between workers from one step to the next, so that workers may join and leave a run.

What is decided stands in :mod:`skippipe_plugin.driver.resizing`; here it is carried out. Only blocks whose worker
changes travel, with weights, buffers, attributes that forwards have written, accumulated gradients and optimizer state,
so nothing of the training changes.

A move has two halves. First everything that must travel is fetched and nothing is changed: a loss up to here is one of
the old layout. Then each worker of the new layout has an order, which says what it holds from now on and brings what it
lacks. Orders can be repeated, so a loss in this half is one of the new layout: the others get their orders once more.
Workers without a place in it keep what they have until all orders are carried out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..engine import phases
from ..engine.control.commands import Arrange
from ..engine.parcel import KeptRecord
from ..schedule import Schedule
from .layout import Layout
from .links import Link
from .orders import carry_out, fetch, fetch_records, num_bytes, order
from .pipeline import Pipeline
from .resizing import Workforce, arrivals, num_stages_for, seats

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a number of stages makes."""

    layout: Layout
    schedules: Mapping[str, Schedule]


@dataclass(frozen=True, slots=True)
class MoveEvent:
    """Workers joined or left, and the blocks were spread anew."""

    before: int
    """The number of stages before."""
    after: int
    num_blocks: int
    """How many blocks went to another worker."""
    num_bytes: int
    """What travelled with them."""
    seconds: float
    """For how long training paused."""

    def __str__(self) -> str:
        why = "joined" if self.after > self.before else "left"
        return (
            f"workers {why}: {self.after} stages instead of {self.before}. {self.num_blocks} blocks "
            f"({self.num_bytes / 2**20:.1f} MiB) moved within {self.seconds:.2f} s; results do not change"
        )


class Candidates(Protocol):
    """Workers without stages."""

    def idle(self) -> Sequence[Link]:
        """Return all that are ready."""

    def joined(self) -> Sequence[Link]:
        """Return those that joined by hand, and are ready."""

    def num_coming(self) -> int:
        """Return how many are being started."""

    def lend(self, links: Sequence[Link]) -> None:
        """Let these be used."""

    def take_back(self, links: Sequence[Link]) -> None:
        """Have these idle again, or send them home if they want to leave."""


class Mover:
    """Keeps the layout of one pipeline fitting the workers there are.

    Args:
        pipeline: Of a single driver, whose own blocks stay where they are.
        candidates: Where workers come from and go to.
        shapes: Returns what a number of stages makes; None where the settings do not allow that number.
        replicas: How many workers hold each stage.
        spares: How many workers shall be ready beside those that hold stages.
        adopted: Called when the pipeline has another layout, before it forms.
        report: Called with each event, for logs and metrics.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        candidates: Candidates,
        shapes: Callable[[int], Shape | None],
        *,
        replicas: int,
        spares: int,
        adopted: Callable[[], None],
        report: Callable[[MoveEvent], None],
    ) -> None:
        self._pipeline = pipeline
        self._candidates = candidates
        self._shapes = shapes
        self._replicas = replicas
        self._spares = spares
        self._adopted = adopted
        self._report = report
        self._orders: dict[int, Arrange] = {}
        """By rank: what has not been carried out for sure."""
        self._parting: list[Link] = []
        """Who has no stages in the new layout, and gives nothing up before the others have theirs."""

    @property
    def unfinished(self) -> bool:
        """Whether a loss interrupted a move; :meth:`finish` must follow before anything else is done."""
        return bool(self._orders)

    def resize(self) -> None:
        """Between two steps with every worker there: change the number of stages if workers joined or left."""
        layout, driver = self._pipeline.layout, self._pipeline.rank
        own, present = len(layout.stages_of(driver)), self._num_stages
        wanted = own + num_stages_for(
            self._workforce(),
            present=present - own,
            replicas=self._replicas,
            spares=self._spares,
            most=layout.num_blocks - len(layout.hosted(driver)),
        )
        shape = self._shapes(wanted) if wanted != present else None
        if shape is not None:
            self._move(shape)

    def finish(self) -> None:
        """Let every worker carry its order out; the groups have been formed."""
        carry_out(self._pipeline, self._orders)
        self._orders.clear()
        self._candidates.take_back(self._parting)
        self._parting = []

    def forget(self, rank: int) -> None:
        """Give up the order of a rank whose worker is lost: its stages must be rebuilt."""
        self._orders.pop(rank, None)

    @property
    def _num_stages(self) -> int:
        return len(self._pipeline.layout.stage_blocks)

    def _workforce(self) -> Workforce:
        leaving = sum(link.leaving for link in self._pipeline.links)
        return Workforce(
            staying=len(self._pipeline.links) - leaving,
            leaving=leaving,
            ready=len(self._candidates.idle()),
            joined=len(self._joined()),
            coming=self._candidates.num_coming(),
        )

    def _joined(self) -> list[Link]:
        """Those that have imported what they need: the others would hold everybody up."""
        return [link for link in self._candidates.joined() if link.warm]

    def _move(self, shape: Shape) -> None:
        phases.reach(phases.Phase.MOVING)
        started_s = time.monotonic()
        pipeline, layout, before = self._pipeline, shape.layout, self._num_stages
        pipeline.heal()
        workers = [link for link in pipeline.links if not link.leaving]
        held: list[Collection[int]] = [pipeline.layout.hosted(link.rank) for link in workers]
        newcomers = self._joined()[: max(0, len(layout.workers) - len(workers))]
        held += [()] * len(newcomers)
        workers += newcomers
        if len(workers) < len(layout.workers):
            return  # somebody left this moment; the next step sees who is there
        chosen = seats(held, [layout.hosted(rank) for rank in layout.workers], pipeline.remote.block_bytes())
        places = {rank: (held[worker], workers[worker]) for rank, worker in zip(layout.workers, chosen, strict=True)}
        moving = {rank: arrivals(blocks, layout.hosted(rank)) for rank, (blocks, _) in places.items()}
        cargo = fetch(self._sources({block for blocks in moving.values() for block in blocks}))
        records = self._records()
        # From here on the new layout counts.
        self._candidates.lend(newcomers)
        pipeline.relayout(layout, shape.schedules)
        self._parting = pipeline.links.reseat({r: (layout.stages_of(r), link) for r, (_, link) in places.items()})
        keepers = [link.rank for link in pipeline.links.keepers()]
        self._orders = {
            rank: order(pipeline, rank, cargo, held=blocks, records=records if rank in keepers else {}, moves=True)
            for rank, (blocks, _) in places.items()
        }
        self._adopted()
        travels = sum(map(num_bytes, self._orders.values()))
        num_blocks = sum(map(len, moving.values()))
        pipeline.form()
        self.finish()
        self._report(MoveEvent(before, self._num_stages, num_blocks, travels, time.monotonic() - started_s))

    def _sources(self, blocks: Collection[int]) -> dict[Link, list[int]]:
        """Choose for each block the first worker that holds it."""
        left, sources = set(blocks), {}
        for link in self._pipeline.links:
            own = sorted(left.intersection(self._pipeline.layout.hosted(link.rank)))
            left -= set(own)
            if own:
                sources[link] = own
        return sources

    def _records(self) -> dict[str, KeptRecord]:
        """Fetch what is kept of the driver's own state; a worker that took over lately may lack some of it."""
        return {name: part for link in self._pipeline.links.keepers() for name, part in fetch_records(link).items()}
