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

from ..engine.channel import Buffer
from ..engine.parcel import pack_parts, unpack_parts
from .arrange import arrange
from .holdings import Fields, Holdings, State


@dataclass(slots=True)
class _Kept:
    holdings: Holdings = field(default_factory=Holdings)
    records: dict[str, tuple[Fields, Sequence[Buffer]]] = field(default_factory=dict)


class Keep:
    """The holdings of a worker, present and retained."""

    def __init__(self) -> None:
        self._now = _Kept()
        self._parting: _Kept | None = None
        """What was held before an order that others may not have carried out."""
        self._retained: Sequence[_Kept] = ()
        self._results: dict[str, tuple[Fields, Sequence[Buffer]]] = {}

    @property
    def holdings(self) -> Holdings:
        """What the worker computes with."""
        return self._now.holdings

    def forget(self) -> None:
        """Drop the records of the driver's state: the stages that they belong to are about to be others."""
        self._now.records.clear()
        self._parting = None

    def arrange(self, fields: Fields, blobs: Sequence[Buffer], device: torch.device) -> None:
        """Hold from now on what the driver says; see :func:`skippipe_plugin.worker.arrange.arrange`."""
        parts = unpack_parts(fields["parts"], blobs)
        self._parting = self._parting or _Kept(copy.copy(self.holdings), self._now.records)
        arrange(self.holdings, fields, parts, device)
        self._now.records = unpack_parts(*parts["records"])

    def obey(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        """Do what ``fields["do"]`` says; return the answer."""
        answer: State | None = getattr(self, f"_{fields['do']}")(fields, blobs)
        return answer or ({}, [])

    # ------------------------------------------------- while a driver trains

    def _prepare(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        """All that came before is done."""

    def _store(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        records = self._results if fields["lasting"] else self._now.records
        records[fields["name"]] = fields, blobs
        return {"records": list(records)}, []

    def _settle(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        self._retained, self._parting = (), None
        self.holdings.step = fields["step"]

    def _records(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        records, data = pack_parts(self._now.records)
        return {"records": records}, data

    def _part(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        """Everybody holds what the driver has ordered."""
        self._parting = None

    def _estimate(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        """Some blocks were rebuilt by the driver."""
        self.holdings.estimates |= set(fields["blocks"]) & self.holdings.blocks().keys()

    def _drop(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        """Others hold everything."""
        self._now, self._parting, self._retained = _Kept(), None, ()

    # --------------------------------------------- for a driver that comes anew

    @property
    def _last(self) -> Sequence[_Kept]:
        """What the last driver has left, in one or two parts that may have blocks in common."""
        return self._retained or [self._now, *([] if self._parting is None else [self._parting])]

    def _summary(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        records = {name: record for kept in self._last for name, (record, _) in kept.records.items()}
        return {
            "blocks": [list(kept.holdings.blocks()) for kept in self._last],
            "records": {name: (record["fit"], record["step"]) for name, record in records.items()},
            "results": [record["fit"] for record, _ in self._results.values()],
        }, []

    def _record(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        records = [self._results, *(kept.records for kept in self._last)]
        record, data = next(each[fields["name"]] for each in reversed(records) if fields["name"] in each)
        return {"record": record}, list(data)

    def _state(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        return self._last[fields["part"]].holdings.state(fields["what"], fields["blocks"])

    def _finish(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        """Do the optimizer step that the last driver was about to command."""
        holdings = self._last[0].holdings
        if holdings.stages and holdings.step < fields["optimizer_step"]["step"]:
            holdings.step_optimizer(fields["optimizer_step"], blobs[0])

    def _retain(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        self._retained, self._now, self._parting = self._last, _Kept(), None
