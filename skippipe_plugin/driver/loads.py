"""The visits of experts in the batches of one optimizer step: what a balancing loss counts from in the next batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class LoadWindow:
    """Visits by router, over the batches whose gradients are accumulated."""

    def __init__(self) -> None:
        self._loads: dict[str, list[int]] = {}
        self._new: dict[str, list[int]] = {}

    @property
    def base(self) -> Mapping[str, Sequence[int]]:
        """What the next batch counts from."""
        return self._loads

    def note(self, parts: Iterable[Mapping[str, Sequence[int]]]) -> None:
        """Keep the visits of a step, by router and rank, until its gradients are added."""
        self._new = {}
        for part in parts:
            add_loads(self._new, part)

    def merge(self) -> None:
        """Add the last step's visits, with its gradients."""
        add_loads(self._loads, self._new)
        self._new = {}

    def clear(self) -> None:
        """Begin anew: the optimizer has stepped, or gradients were dropped."""
        self._loads = {}


def add_loads(total: dict[str, list[int]], part: Mapping[str, Sequence[int]]) -> None:
    """Add counts by router in place."""
    for name, loads in part.items():
        total[name] = [a + b for a, b in zip(total.get(name, [0] * len(loads)), loads, strict=True)]
