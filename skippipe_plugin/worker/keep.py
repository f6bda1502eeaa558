"""What a worker keeps while drivers come and go: its stages, and its copy of what the driver itself holds.

The records of the driver's state are stored and handed out unread. A driver that has been started again lets its
workers retain what they hold until all of it stands anew, so that it may be lost on the way too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.channel import Buffer
from .holdings import Fields, Holdings, State


@dataclass(slots=True)
class _Kept:
    holdings: Holdings = field(default_factory=Holdings)
    records: dict[str, tuple[Fields, Sequence[Buffer]]] = field(default_factory=dict)


class Keep:
    """The holdings of a worker, present and retained."""

    def __init__(self) -> None:
        self._now = _Kept()
        self._retained: _Kept | None = None
        self._results: dict[str, tuple[Fields, Sequence[Buffer]]] = {}

    @property
    def holdings(self) -> Holdings:
        """What the worker computes with."""
        return self._now.holdings

    def forget(self) -> None:
        """Drop the records of the driver's state: the stages that they belong to are about to be others."""
        self._now.records.clear()

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
        self._retained = None
        self.holdings.step = fields["step"]

    # --------------------------------------------- for a driver that comes anew

    @property
    def _last(self) -> _Kept:
        return self._retained or self._now

    def _summary(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        kept = self._last
        return {
            "stages": list(kept.holdings.stages),
            "records": {name: (record["fit"], record["step"]) for name, (record, _) in kept.records.items()},
            "results": [record["fit"] for record, _ in self._results.values()],
        }, []

    def _record(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        record, data = {**self._results, **self._last.records}[fields["name"]]
        return {"record": record}, list(data)

    def _state(self, fields: Fields, blobs: Sequence[Buffer]) -> State:
        return self._last.holdings.state(fields["what"])

    def _finish(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        """Do the optimizer step that the last driver was about to command."""
        holdings = self._last.holdings
        if holdings.stages and holdings.step < fields["optimizer_step"]["step"]:
            holdings.step_optimizer(fields["optimizer_step"], blobs[0])

    def _retain(self, fields: Fields, blobs: Sequence[Buffer]) -> None:
        self._retained, self._now = self._last, _Kept()
