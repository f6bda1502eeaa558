"""What a worker keeps while drivers come and go: its stages, and its copy of what the driver itself holds.

The records of the driver's state are stored and handed out unread. A driver that has been started again lets its
workers retain what they hold until all of it stands anew, so that it may be lost on the way too. For the same reason a
worker does not part with blocks that go to another one before that one has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..engine.control.answers import State
from ..engine.control.codec import Control
from ..engine.control.commands import Arrange
from ..engine.control.handlers import Handlers
from ..engine.control.keeping import (
    AskRecord,
    AskRecords,
    AskSummary,
    FinishStep,
    GetRetained,
    Kept,
    LetGo,
    NoteEstimates,
    OneRecord,
    Part,
    Prepare,
    Records,
    Retain,
    Settle,
    Store,
    Stored,
    Summary,
)
from ..engine.control.values import Stand
from ..engine.errors import SkipPipeError
from ..engine.parcel import KeptRecord, Parcel, pack_records
from .arrange import arrange
from .holdings import Holdings


@dataclass(slots=True)
class _Kept:
    holdings: Holdings = field(default_factory=Holdings)
    records: dict[str, KeptRecord] = field(default_factory=dict)


class Keep:
    """The holdings of a worker, present and retained."""

    def __init__(self) -> None:
        self._now = _Kept()
        self._parting: _Kept | None = None
        """What was held before an order that others may not have carried out."""
        self._retained: Sequence[_Kept] = ()
        self._results: dict[str, KeptRecord] = {}

    @property
    def holdings(self) -> Holdings:
        """What the worker computes with."""
        return self._now.holdings

    def forget(self) -> None:
        """Drop the records of the driver's state: the stages that they belong to are about to be others."""
        self._now.records.clear()
        self._parting = None

    def arrange(self, order: Arrange, device: torch.device) -> None:
        """Hold from now on what the driver says; see :func:`skippipe_plugin.worker.arrange.arrange`."""
        parcel = Parcel.unpack(order.parts, order.blobs)
        self._parting = self._parting or _Kept(copy.copy(self.holdings), self._now.records)
        arrange(self.holdings, order, parcel, device)
        self._now.records = {**parcel.records}

    def add_to(self, handlers: Handlers) -> None:
        """Obey all messages of :mod:`skippipe_plugin.engine.control.keeping`, but for those that end what is kept."""
        handlers.on(Prepare, self.prepare)
        handlers.on(Store, self.store)
        handlers.on(Settle, self.settle)
        handlers.on(AskRecords, self.records)
        handlers.on(LetGo, self.let_go)
        handlers.on(NoteEstimates, self.note_estimates)
        handlers.on(AskSummary, self.summary)
        handlers.on(AskRecord, self.record)
        handlers.on(GetRetained, self.retained)
        handlers.on(FinishStep, self.finish_step)
        handlers.on(Retain, self.retain)

    # ------------------------------------------------- while a driver trains

    def store(self, command: Store) -> Control | None:
        """Keep a record."""
        records = self._results if command.record.lasting else self._now.records
        records[command.record.name] = command.record, command.blobs
        return None if command.quiet else Stored(list(records))

    def settle(self, command: Settle) -> Kept:
        """Forget what the last driver has left."""
        self._retained, self._parting = (), None
        self.holdings.stand = self.holdings.whole = command.stand
        return Kept()

    def prepare(self, command: Prepare) -> Kept:
        """Note that an optimizer step is due: all that came before is done."""
        self.holdings.whole = command.stand
        return Kept()

    def records(self, _: AskRecords) -> Records:
        """Return all records."""
        return Records(*pack_records(self._now.records.values()))

    def let_go(self, _: LetGo) -> None:
        """Everybody holds what the driver has ordered."""
        self._parting = None

    def note_estimates(self, command: NoteEstimates) -> None:
        """Some blocks were rebuilt by the driver."""
        self.holdings.estimates |= set(command.blocks) & self.holdings.blocks().keys()

    def drop(self) -> None:
        """Others hold everything."""
        self._now, self._parting, self._retained = _Kept(), None, ()

    # --------------------------------------------- for a driver that comes anew

    @property
    def _last(self) -> Sequence[_Kept]:
        """What the last driver has left, in one or two parts that may have blocks in common."""
        return self._retained or [self._now, *([] if self._parting is None else [self._parting])]

    def summary(self, _: AskSummary) -> Summary:
        """Return what is left of the last driver."""
        records = {name: record for kept in self._last for name, (record, _) in kept.records.items()}
        return Summary(
            parts=[Part(list(kept.holdings.blocks()), kept.holdings.stand, kept.holdings.whole) for kept in self._last],
            records={name: (record.fit, record.step) for name, record in records.items()},
            results=[record.fit for record, _ in self._results.values()],
        )

    def record(self, question: AskRecord) -> OneRecord:
        """Return one record of the last driver."""
        for records in (*(kept.records for kept in reversed(self._last)), self._results):
            if question.name in records:
                return OneRecord(*records[question.name])
        raise SkipPipeError(f"no record {question.name!r} is kept here")

    def retained(self, question: GetRetained) -> State:
        """Return what belongs to blocks of the last driver."""
        if not 0 <= question.part < len(self._last):
            raise SkipPipeError(f"part {question.part} of what the last driver has left is not here")
        return self._last[question.part].holdings.state(question.what, question.blocks)

    def finish_step(self, command: FinishStep) -> Kept:
        """Do the optimizer step that the last driver was about to command, unless it is not this worker's.

        Who was cut off before may lack a part of its gradients, or belong to another fit.
        """
        holdings, due = self._last[0].holdings, Stand(command.fit, command.order.step)
        if holdings.stages and holdings.whole == due and holdings.stand.step < due.step:
            holdings.step_optimizer(command.order, command.settings)
        return Kept()

    def retain(self, _: Retain) -> Kept:
        """Keep what the last driver has left until all is settled."""
        self._retained, self._now, self._parting = self._last, _Kept(), None
        return Kept()
