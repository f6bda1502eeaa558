"""What ran when: the same type whether the simulator predicted it or the engine measured it.

A timeline is data plus views of it: shares of busy time, a text table, a Chrome trace. It knows actions and ranks,
but neither the schedule nor the costs behind them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from skippipe_plugin.schedule.ir import Action, Op, Schedule
from skippipe_plugin.schedule.jsontext import parse

_FORMAT = "skippipe-timeline"
_VERSION = 1
_MICROSECONDS = 1e6


class Event(NamedTuple):
    """One action on one rank, in seconds since the start of the step."""

    rank: int
    action: Action
    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message: the result of ``action`` on its way from the source rank to the destination rank."""

    source: int
    destination: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a rank beside its actions, such as a recovery."""

    rank: int
    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """The events and transfers of one step.

    >>> event = Event(0, Action.parse("0F0"), 0.0, 0.5)
    >>> timeline = Timeline((event,), (), label="one action")
    >>> timeline.makespan_s, timeline.busy_share(0)
    (0.5, 1.0)
    """

    events: tuple[Event, ...]
    transfers: tuple[Transfer, ...] = ()
    label: str = ""
    marks: tuple[Mark, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that ran anything, ascending."""
        return tuple(sorted({event.rank for event in self.events}))

    @property
    def makespan_s(self) -> float:
        """Seconds from the first start to the last end; 0 without events."""
        if not self.events:
            return 0.0
        return max(event.end_s for event in self.events) - min(event.start_s for event in self.events)

    def of_rank(self, rank: int) -> list[Event]:
        """Return the events of a rank by start."""
        events = [event for event in self.events if event.rank == rank]
        return sorted(events, key=lambda event: (event.start_s, event.end_s))

    def busy_s(self, rank: int) -> float:
        """Return the seconds in which a rank ran actions."""
        return sum(event.duration_s for event in self.events if event.rank == rank)

    def busy_share(self, rank: int) -> float:
        """Return the share of the makespan in which a rank ran actions (0 for an empty timeline)."""
        return self.busy_s(rank) / self.makespan_s if self.makespan_s else 0.0

    def idle_share(self, rank: int) -> float:
        """Return the share of the makespan in which a rank waited."""
        return 1.0 - self.busy_share(rank)

    def peak_activations(self, rank: int) -> int:
        """Return the largest number of (stage, microbatch) pairs that lived on a rank at once.

        A pair lives from the start of its first event to the end of its last one; touching ends do not overlap.
        """
        spans: dict[tuple[int, int], tuple[float, float]] = {}
        for event in self.events:
            if event.rank == rank:
                pair = (event.action.stage, event.action.microbatch)
                start, end = spans.get(pair, (event.start_s, event.end_s))
                spans[pair] = (min(start, event.start_s), max(end, event.end_s))
        long = [(start, end) for start, end in spans.values() if end > start]
        changes = sorted([(start, 1) for start, _ in long] + [(end, -1) for _, end in long])
        live = peak = 0
        for _, change in changes:
            live += change
            peak = max(peak, live)
        return peak

    def table(self) -> str:
        """Return a text table: busy seconds, shares and peak activations of each rank."""
        lines = [f"{self.label or 'timeline'}: {self.makespan_s:.6g} s"]
        lines.append(f"{'rank':>4} {'actions':>7} {'busy s':>10} {'busy':>6} {'idle':>6} {'peak':>4}")
        for rank in self.ranks:
            lines.append(
                f"{rank:>4} {len(self.of_rank(rank)):>7} {self.busy_s(rank):>10.4g} {self.busy_share(rank):>6.1%} "
                f"{self.idle_share(rank):>6.1%} {self.peak_activations(rank):>4}"
            )
        return "\n".join(lines)

    def gantt(self, width: int = 100) -> str:
        """Return one line per rank: the op that runs at the middle of each of ``width`` slots, a dot where none."""
        origin = min((event.start_s for event in self.events), default=0.0)
        slot_s = self.makespan_s / width
        return "\n".join(f"{rank:>3} {_row(self.of_rank(rank), origin, slot_s, width)}" for rank in self.ranks)

    def __str__(self) -> str:
        return f"{self.table()}\n{self.gantt()}"

    def chrome_trace(self) -> dict[str, Any]:  # Any: JSON
        """Return the Chrome trace (chrome://tracing, Perfetto): one process per rank, an arrow per message."""
        names = [
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
            for rank in self.ranks
        ]
        slices = [_slice(event) for event in self.events]
        trace_events = [*names, *slices, *_arrows(self), *map(_instant, self.marks)]
        return {"traceEvents": trace_events, "displayTimeUnit": "ms", "otherData": {"label": self.label}}

    def to_json(self) -> str:
        """Return the timeline as JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "label": self.label,
                "events": [[e.rank, str(e.action), e.start_s, e.end_s] for e in self.events],
                "transfers": [[t.source, t.destination, str(t.action), t.start_s, t.end_s] for t in self.transfers],
                "marks": [[mark.rank, mark.at_s, mark.text] for mark in self.marks],
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` writes.

        Raises:
            ValueError: Not JSON of this format, or an entry has another form.
        """
        data = parse(text)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
            raise ValueError(f"not a {_FORMAT} of version {_VERSION}")
        try:
            events = tuple(Event(_rank(r), _action(a), _time(s), _time(e)) for r, a, s, e in data["events"])
            transfers = tuple(
                Transfer(_rank(r), _rank(d), _action(a), _time(s), _time(e)) for r, d, a, s, e in data["transfers"]
            )
            marks = tuple(Mark(_rank(r), _time(s), str(t)) for r, s, t in data.get("marks", ()))  # not in early files
            return cls(events, transfers, str(data["label"]), marks)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a {_FORMAT} with an entry of another form: {error!r}") from error

    @classmethod
    def from_chrome_trace(cls, trace: Mapping[str, Any]) -> Self:  # Any: JSON
        """Read the events of what `chrome_trace` returns; a trace does not hold when its messages arrived.

        Raises:
            ValueError: A trace of something else.
        """
        try:
            slices = [entry for entry in trace["traceEvents"] if entry["ph"] == "X"]
            events = tuple(
                Event(
                    _rank(s["pid"]),
                    _action(s["name"]),
                    _time(s["ts"]) / _MICROSECONDS,
                    (_time(s["ts"]) + _time(s["dur"])) / _MICROSECONDS,
                )
                for s in slices
            )
            return cls(events, label=str(trace.get("otherData", {}).get("label", "")))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"a trace of something else than a pipeline: {error!r}") from error


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1_000_000:
        raise ValueError(f"{value!r} is no rank")
    return value


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no time in seconds")
    return value


def _action(value: object) -> Action:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no action")
    return Action.parse(value)


def utilisation(timeline: Timeline, schedule: Schedule) -> float:
    """Return the mean busy share of the workers; of the drivers where they do all the work."""
    ranks = set(range(schedule.num_ranks)) - set(schedule.drivers) or set(schedule.drivers)
    return sum(map(timeline.busy_share, ranks)) / len(ranks)


def _row(events: Iterable[Event], origin: float, slot_s: float, width: int) -> str:
    row = ["."] * width
    for event in events:
        first = round((event.start_s - origin) / slot_s) if slot_s else 0
        last = round((event.end_s - origin) / slot_s) if slot_s else 0
        row[first:last] = event.action.op.value * (last - first)
    return "".join(row)


def _slice(event: Event) -> dict[str, object]:
    return {
        "ph": "X",
        "name": str(event.action),
        "cat": event.action.op.value,
        "pid": event.rank,
        "tid": 0,
        "ts": event.start_s * _MICROSECONDS,
        "dur": event.duration_s * _MICROSECONDS,
        "args": {"stage": event.action.stage, "microbatch": event.action.microbatch},
    }


def _instant(mark: Mark) -> dict[str, object]:
    return {"ph": "i", "s": "p", "name": mark.text, "pid": mark.rank, "tid": 0, "ts": mark.at_s * _MICROSECONDS}


def _arrows(timeline: Timeline) -> Iterator[dict[str, object]]:
    """Yield the two ends of each transfer's arrow, each inside the slice it belongs to."""
    producers = {(event.rank, event.action): event for event in timeline.events}
    waiting: dict[tuple[int, int], list[Event]] = {}
    for event in sorted(timeline.events, key=lambda event: event.start_s):
        if event.action.op is not Op.W:
            waiting.setdefault((event.rank, event.action.microbatch), []).append(event)
    for number, transfer in enumerate(timeline.transfers):
        producer = producers.get((transfer.source, transfer.action))
        consumer = _consumer(transfer, waiting)
        if producer is not None and consumer is not None:
            flow = {"name": str(transfer.action), "cat": "message", "id": number, "tid": 0}
            yield {**flow, "ph": "s", "pid": transfer.source, "ts": _middle(producer)}
            yield {**flow, "ph": "f", "bp": "e", "pid": transfer.destination, "ts": _middle(consumer)}


def _consumer(transfer: Transfer, waiting: Mapping[tuple[int, int], list[Event]]) -> Event | None:
    """Return the action that took the message: the microbatch's first one at the destination after its arrival."""
    events = waiting.get((transfer.destination, transfer.action.microbatch), [])
    return next((event for event in events if event.start_s >= transfer.end_s), None)


def _middle(event: Event) -> float:
    return (event.start_s + event.end_s) / 2 * _MICROSECONDS
