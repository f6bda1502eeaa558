"""Bring lost stages back between two attempts of what a loss has interrupted.

A loss is noted by the links; whatever was under way is given up everywhere, so no rank is ever a step ahead. Before it
is tried again the stage gets a new worker (or paths go around it until there is one), in a new generation of groups.
What the new worker holds comes from the cheapest source: the worker that leaves politely or another replica, exactly
and with optimizer state; otherwise the neighbouring stages, by the rules of :mod:`skippipe_plugin.recovery`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from ...engine.control.commands import Arrange, Warm
from ...engine.errors import ConnectionsBroken, SkipPipeError, StageLostError
from ...engine.handover import import_paths
from ...schedule import ScheduleError, leaves_out
from ..links import Link
from ..moving import Mover
from ..orders import Cargo, carry_out, fetch, fetch_records, order
from ..pipeline import Pipeline
from .heartbeat import Heartbeat
from .losses import Losses, as_text
from .neighbours import Origin, Source, rebuilt_stage
from .policy import RecoveryPolicy
from .report import RecoveryEvent

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_GOES_S: Final = 10.0
"""How long it may take until the channel to a worker that was given up has ended here."""
_LOOK_S: Final = 0.005


@dataclass(frozen=True, slots=True)
class _Rebuilt:
    """What a new worker was given."""

    source: Source
    origins: tuple[Origin, ...] = ()


class Replacements(Protocol):
    """Where new workers come from."""

    def idle(self) -> Sequence[Link]:
        """Return the workers that are ready and unused."""

    def resting(self) -> Sequence[Link]:
        """Return the workers that are unused, whether they are awake or not."""

    def fence(self, link: Link) -> None:
        """Make sure that a worker that counts as lost does nothing any more, if it is one of ours."""

    def prepare(self, count: int) -> None:
        """See to it that ``count`` workers will be idle soon; return at once."""

    def take(self, count: int) -> list[Link]:
        """Return ``count`` workers, waiting for them."""

    def take_back(self, links: Sequence[Link]) -> None:
        """Have these idle again, or send them home if they want to leave."""


@dataclass(slots=True)
class _Missing:
    """A rank whose worker is gone."""

    how_lost: str
    since_s: float = field(default_factory=time.monotonic)
    steps_around: int = 0
    leaver: Link | None = None
    """Who has left the rank politely, and keeps what it holds until another worker has it."""
    order: Arrange | None = None
    """What gives another worker all that the leaver held."""


class StageKeeper:
    """Keeps every stage of one pipeline held by somebody.

    Args:
        pipeline: Of a single driver.
        policy: What to do.
        replacements: Where new workers come from.
        report: Called with each event, for logs and metrics.
        mover: Spreads the blocks anew when workers join or leave; None when the number of stages is fixed.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        policy: RecoveryPolicy,
        replacements: Replacements,
        report: Callable[[RecoveryEvent], None],
        mover: Mover | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._policy = policy
        self._replacements = replacements
        self._report = report
        self._mover = mover
        self._missing: dict[int, _Missing] = {}
        self._losses = Losses()
        self.gave_up = False
        self._warmed: set[int] = set()
        self._attempting = False
        self.heartbeat = Heartbeat(pipeline.links, policy.heartbeat_s, replacements.resting, replacements.fence)
        pipeline.links.recovering = True
        pipeline.gradients.keep_norms = True

    def close(self) -> None:
        """Stop watching."""
        self.heartbeat.close()
        self._pipeline.links.recovering = False

    def attempt(self, action: Callable[[], _T], rewind: Callable[[], None], *, whole: bool) -> _T:
        """Run ``action`` until it has succeeded, replacing workers that are lost under it.

        Args:
            action: May be given up at any point and run again.
            rewind: Undoes what the user's code has changed on the driver, before ``action`` runs again.
            whole: Whether every stage must be there; otherwise paths may go around missing ones.
        """
        if self._attempting:  # what encloses this will repeat it
            return action()
        while True:
            try:
                self._tend(whole)
                with self._attempt_under_way():
                    result = action()
            except (StageLostError, ConnectionsBroken) as error:
                self._note_losses(error)
                rewind()
            else:
                for missing in self._missing.values():
                    missing.steps_around += not whole  # others read, or evaluate
                self._losses.forget()
                return result

    def settle_in(self, action: Callable[[], None]) -> None:
        """Run ``action``, which brings every worker what it holds, until it has succeeded.

        Until then the driver has all of it, so a worker that is lost takes nothing with it.
        """
        while True:
            try:
                self._fill_vacant()
                action()
            except (StageLostError, ConnectionsBroken) as error:
                self._note_losses(error)
            else:
                break
        self._losses.forget()
        lost = list(self._missing)
        for rank in lost:
            self._tell(rank, _Rebuilt("driver"))
        if lost:
            self._prepare()

    @contextmanager
    def _attempt_under_way(self) -> Iterator[None]:
        self._attempting = True
        try:
            yield
        finally:
            self._attempting = False

    # -------------------------------------------------------------- losses

    def _note_losses(self, error: StageLostError | ConnectionsBroken) -> None:
        pipeline = self._pipeline
        pipeline.abort()
        taking_over = self._taking_over
        lost = pipeline.links.drop_lost()
        if isinstance(error, ConnectionsBroken) and not lost:
            self._losses.note_break(error)
            lost = self._part(self._losses.parted())
            if not lost:
                log.warning("%s Others are made, and what was under way is repeated", error)
                return
        if not lost:
            raise error
        for link in lost:
            self._replacements.fence(link)
            log.warning("worker rank %d (stage %s) is lost: %s", link.rank, as_text(link.stages), link.how_lost)
            if self._mover is not None:
                self._mover.forget(link.rank)
            self._missing.setdefault(link.rank, _Missing(link.how_lost))
            try:
                self._losses.note(link, took_over=link.rank not in taking_over, error=error)
            except SkipPipeError:
                self.gave_up = True
                raise

    def _part(self, ends: Sequence[int]) -> list[Link]:
        """Give one of two workers up that live and do not reach each other; return it, once it is gone.

        Rather one on another host, since others are started here, and one that has a replica.
        """
        links = [link for link in self._pipeline.links if link.rank in ends]
        if not links:
            return []
        link = min(links, key=lambda each: (each.is_local, self._replica(each.rank) is None, each.rank))
        other = ", ".join(f"rank {rank}" for rank in ends if rank != link.rank)
        link.give_up(f"its connections with {other} broke again and again", ", though both live,")
        deadline = time.monotonic() + _GOES_S
        while not link.gone and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return self._pipeline.links.drop_lost()

    @property
    def _taking_over(self) -> set[int]:
        """The missing ranks that have a new worker already."""
        return {rank for rank in self._missing if rank in self._pipeline.links}

    def _prepare(self) -> None:
        # Who leaves an elastic run needs no replacement.
        leaving = sum(link.leaving for link in self._pipeline.links) if self._mover is None else 0
        try:
            self._replacements.prepare(len(self._missing) + leaving + self._policy.spares)
        except SkipPipeError as error:  # whoever needs one of them will say so
            log.warning("%s", error)

    # -------------------------------------------------------- replacements

    def _tend(self, whole: bool) -> None:
        """Bring in replacements: all that are needed, or those that are ready."""
        self._prepare()  # a spare may have died too
        self._warm_spares()
        self._relieve()
        if not self._missing:
            if self._mover is not None and not whole:
                self._mover.resize()
            return
        vacant = self._missing.keys() - self._taking_over
        if len(self._replacements.idle()) < len(vacant) and self._may_go_around(whole):
            if self._taking_over or (self._mover is not None and self._mover.unfinished):
                self._complete()
            return
        self._fill()

    def _may_go_around(self, whole: bool) -> bool:
        """Let the paths avoid the missing ranks, if that is wanted and possible; exact where replicas are left."""
        pipeline, missing = self._pipeline, self._missing.keys() - self._taking_over
        if pipeline.layout.expert_parallel > 1:
            return False  # the other holders of a layer's experts cannot run it without the missing one
        partial = bool(leaves_out(pipeline.layout.placement, missing))
        if partial and (whole or self._policy.while_missing == "wait"):
            return False
        try:
            pipeline.go_around(missing)
        except ScheduleError:  # no stage would be left
            return False
        return True

    def _fill(self) -> None:
        self._fill_vacant()
        self._pipeline.go_around(())
        self._complete()
        self._prepare()

    def _fill_vacant(self) -> None:
        """Give each rank that has no worker another one."""
        pipeline = self._pipeline
        vacant = [rank for rank in self._missing if rank not in pipeline.links]
        if vacant:
            for rank, link in zip(vacant, self._replacements.take(len(vacant)), strict=True):
                pipeline.links.add(rank, pipeline.layout.stages_of(rank), link)

    def _complete(self) -> None:
        """Form a generation with everybody who is there, and give the new ones what they have to hold."""
        self._pipeline.form()
        if self._mover is not None:
            self._mover.finish()
        # First what leavers have left: it may be what others are rebuilt from.
        for rank in sorted(self._taking_over, key=lambda rank: self._missing[rank].order is None):
            self._make_whole(rank)

    def _relieve(self) -> None:
        """Replace workers that want to leave, as far as others are ready."""
        pipeline = self._pipeline
        leaving = [link for link in pipeline.links if link.leaving]
        for link in leaving[: len(self._replacements.idle())]:
            noticed_s = time.monotonic()
            pipeline.heal()
            rank, all_of_it = link.rank, order(pipeline, link.rank, self._all_of(link), records=fetch_records(link))
            (replacement,) = self._replacements.take(1)
            pipeline.links.drop(rank)
            pipeline.links.add(rank, link.stages, replacement)
            self._missing[rank] = _Missing("it asked to leave", noticed_s, leaver=link, order=all_of_it)
            pipeline.form()
            self._make_whole(rank)

    def _make_whole(self, rank: int) -> None:
        """Give the new worker at ``rank`` what it has to hold, and say so."""
        missing = self._missing[rank]
        if missing.order is not None:
            carry_out(self._pipeline, {rank: missing.order})
            rebuilt = _Rebuilt("relieved")
        else:
            rebuilt = self._rebuild(rank)
        if missing.leaver is not None:
            self._replacements.take_back([missing.leaver])
        self._tell(rank, rebuilt)

    def _tell(self, rank: int, rebuilt: _Rebuilt) -> None:
        """Count the worker at ``rank`` as whole, and say so."""
        missing = self._missing.pop(rank)
        stages = tuple(self._pipeline.layout.stages_of(rank))
        seconds = time.monotonic() - missing.since_s
        accumulation = self._pipeline.gradients.accumulation
        self._report(
            RecoveryEvent(
                rank,
                stages,
                missing.how_lost,
                rebuilt.source,
                seconds,
                missing.steps_around,
                rebuilt.origins,
                accumulation.num_batches if accumulation.lacks(rank) else 0,
            )
        )

    def _warm_spares(self) -> None:
        """Let spares import what they will need."""
        blocks, blobs = self._pipeline.sender.sample()
        for link in self._replacements.idle():
            if id(link) not in self._warmed:
                self._warmed.add(id(link))
                link.tell(Warm(import_paths(), blocks, blobs))

    # --------------------------------------------------------------- state

    def _rebuild(self, rank: int) -> _Rebuilt:
        """Give the new worker at ``rank`` the state of its stages."""
        pipeline, origins = self._pipeline, list[Origin]()
        stages = pipeline.layout.stages_of(rank)
        replica = self._replica(rank)
        if replica is not None:
            everything = self._all_of(replica)
            self._hand_over(rank, everything)
            pipeline.gradients.accumulation.copied(rank, replica.rank)
            return _Rebuilt("estimate" if everything.estimates else "replica")
        cargo, sources = Cargo(), []
        for stage in stages:
            weights, source, origin = rebuilt_stage(pipeline, stage, self._missing, self._policy.rule)
            cargo.weights.update(weights)
            sources.append(source)
            origins.append(origin)
            pipeline.gradients.lr_factors[stage] = self._policy.lr_factor
        cargo.estimates.update(pipeline.layout.hosted(rank))
        self._hand_over(rank, cargo)
        pipeline.gradients.accumulation.lack(rank)
        return _Rebuilt("neighbours" if "neighbours" in sources else "copy", tuple(origins))

    def _replica(self, rank: int) -> Link | None:
        """Return a worker that holds the same stages as ``rank``, and the same experts of them, and is whole."""
        pipeline = self._pipeline
        position = pipeline.layout.position(rank)
        stages = pipeline.layout.stages_of(rank)
        for link in pipeline.links:
            same = list(link.stages) == stages and pipeline.layout.position(link.rank) == position
            if link.rank not in self._missing and same:
                return link
        return None

    def _all_of(self, link: Link) -> Cargo:
        return fetch({link: self._pipeline.layout.hosted(link.rank)})

    def _hand_over(self, rank: int, cargo: Cargo) -> None:
        carry_out(self._pipeline, {rank: order(self._pipeline, rank, cargo)})
