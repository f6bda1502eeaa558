"""Costs that follow a run: rolling medians over its measured steps, as a cost model."""

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import replace
from math import inf
from statistics import median
from typing import Generic, TypeVar

from skippipe_plugin.schedule.cost import CostModel, NetworkCost
from skippipe_plugin.schedule.fit import Link, awaited_s, fit_compute, gap_s
from skippipe_plugin.schedule.ir import Action, Op, Schedule
from skippipe_plugin.schedule.timeline import Event, Timeline

_Key = TypeVar("_Key", bound=Hashable)


class RollingCosts:
    """Rolling medians of compute by rank, stage and action, and of messages by link.

    What the schedule does not use is not measured. It keeps its last medians while ``memory`` more steps are measured
    and is forgotten then: a rank counts as its replicas again, and a link as in ``start``. So a worker that was slow
    once is tried again.

    Args:
        start: The links as they were measured one by one; what their messages take more in a step is added to the
            links that no step has used yet, or those would look better for being unknown.
        window: Over how many measured steps medians are taken.
        memory: For how many measured steps what is not seen any more is remembered.

    Raises:
        ValueError: ``window`` or ``memory`` is below 1.
    """

    def __init__(self, start: CostModel, *, window: int = 5, memory: int = 40) -> None:
        if window < 1 or memory < 1:
            raise ValueError(f"window={window}, memory={memory}: measured steps are counted from 1 on")
        self._start = start
        self._actions: _Medians[tuple[int, int, Op]] = _Medians(window, memory)
        self._links: _Medians[Link] = _Medians(window, memory)
        self._gaps: _Medians[None] = _Medians(window, memory)

    def add(self, timeline: Timeline, schedule: Schedule) -> None:
        """Take up a measured step, of which only the medians are kept."""
        durations: dict[tuple[int, int, Op], list[float]] = defaultdict(list)
        for event in timeline.events:
            durations[event.rank, event.action.stage, event.action.op].append(event.duration_s)
        self._actions.add({key: median(values) for key, values in durations.items()})
        self._links.add(awaited_s(timeline, schedule))
        self._gaps.add({None: gap_s(timeline, schedule)})

    def model(self, *, latest: bool = False) -> CostModel:
        """Return the costs as they are now; before any step those of the start.

        Args:
            latest: In place of medians, take what was measured last.
        """
        events = [
            Event(rank, Action(stage, op, 0), 0.0, seconds)
            for (rank, stage, op), seconds in self._actions.values(latest).items()
        ]
        if not events:
            return self._start
        pause_s = self._gaps.values(latest)[None]
        compute = fit_compute(events, self._start.num_stages, self._start.num_ranks, pause_s)
        return replace(self._start, compute=compute, network=self._network(latest))

    def _network(self, latest: bool) -> NetworkCost:
        seen, start, ranks = self._links.values(latest), self._start, range(self._start.num_ranks)
        more_s = median([seconds - start.message_s(*link) for link, seconds in seen.items()] or [0.0])

        def seconds(a: int, b: int) -> float:
            return 0.0 if a == b else seen.get((a, b), max(0.0, start.message_s(a, b) + more_s))

        latency_s = tuple(tuple(seconds(a, b) for b in ranks) for a in ranks)
        return NetworkCost(latency_s, ((inf,) * len(ranks),) * len(ranks))


class _Medians(Generic[_Key]):
    """The median of each key's last values."""

    def __init__(self, window: int, memory: int) -> None:
        self._window = window
        self._memory = memory
        self._count = 0
        self._values: dict[_Key, deque[float]] = {}
        self._last: dict[_Key, int] = {}

    def add(self, values: Mapping[_Key, float]) -> None:
        self._count += 1
        for key, value in values.items():
            self._values.setdefault(key, deque(maxlen=self._window)).append(value)
            self._last[key] = self._count
        for key in [key for key, last in self._last.items() if self._count - last > self._memory]:
            del self._values[key], self._last[key]

    def values(self, latest: bool) -> dict[_Key, float]:
        return {key: values[-1] if latest else median(values) for key, values in self._values.items()}
