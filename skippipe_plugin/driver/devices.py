"""Which device each worker computes on, chosen from what its host has when it first takes part in a pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..engine.device import NOWHERE, Place
from ..engine.errors import SkipPipeError


@dataclass(frozen=True, slots=True)
class Devices:
    """What the processes of a run compute on."""

    own: torch.device
    """What this driver computes on; the workers' are of its kind."""
    place: Place = NOWHERE
    """Where this driver is."""
    here: tuple[torch.device, ...] = ()
    """What the processes on its host are to have, one each, the drivers first; empty: this driver has its own, and the
    others what is left."""
    drivers: int = 1
    """How many of :attr:`here` are for drivers."""
    per_device: int = 1
    """How many processes may compute on one device."""

    def assign(self, taken: Iterable[tuple[Place, str]], comes: Place) -> str:
        """Return the device of a worker that comes.

        Args:
            taken: Where the workers are that take part, and what they compute on.
            comes: Where the new one is.

        Raises:
            SkipPipeError: Its host has none for it.
        """
        kind = self.own.type
        if comes.device:
            return self._as_wished(comes)
        if kind == "cpu":
            return "cpu"
        if comes.kind != kind:
            raise SkipPipeError(
                f"the pipeline computes on {kind}, but a worker at {_name(comes)} has "
                f"{f'only {comes.kind}' if comes.kind else 'no accelerator'}, and a worker never computes on the CPU "
                "instead: take that host out of the run, or give its workers their devices back"
            )
        beside = (device for place, device in taken if _sees_alike(place, comes))
        found = next(_without(self._slots(comes), beside), None)
        if found is None:
            raise SkipPipeError(
                f"a worker at {_name(comes)} finds no device: its {comes.num_devices} of {kind} are taken by other "
                "processes of the run. Start fewer workers there, say which one it is to have (skippipe worker "
                f"--device {kind}:0), or let more share one: NetworkConfig(workers_per_device={self.per_device + 1})"
            )
        return found

    def _as_wished(self, comes: Place) -> str:
        kind, _, number = comes.device.partition(":")
        index = int(number or 0)
        if kind != self.own.type:
            raise SkipPipeError(
                f"the worker at {_name(comes)} was started for {comes.device}, but the driver computes on {self.own}; "
                "the processes of a pipeline compute on devices of one kind"
            )
        if kind != "cpu" and (kind != comes.kind or index >= comes.num_devices):
            raise SkipPipeError(
                f"the worker at {_name(comes)} was started for {comes.device}, but it sees {comes.num_devices} of "
                f"{comes.kind or 'any accelerator'}"
            )
        return "cpu" if kind == "cpu" else f"{kind}:{index}"

    def _slots(self, comes: Place) -> Iterator[str]:
        """Yield the devices that workers of a place may have, in the order in which they are given out."""
        kind, shares = self.own.type, range(self.per_device)
        every = [f"{kind}:{index}" for index in range(comes.num_devices) for _ in shares]
        if not _sees_alike(comes, self.place):
            yield from every
            return
        mine, others = (self.here[: self.drivers] or (self.own,)), self.here[self.drivers :]
        yield from map(str, others)
        yield from _without(every, map(str, (*mine, *others)))


def _without(slots: Iterable[str], taken: Iterable[str]) -> Iterator[str]:
    """Yield the slots that are left when each of those taken fills one of its name."""
    left = Counter(taken)
    for each in slots:
        if left[each] > 0:
            left[each] -= 1
        else:
            yield each


def _sees_alike(one: Place, other: Place) -> bool:
    """Whether two processes call the same devices by the same names."""
    return (one.host, one.visible) == (other.host, other.visible)


def _name(place: Place) -> str:
    return place.host.partition(" ")[0] or "an unknown host"
