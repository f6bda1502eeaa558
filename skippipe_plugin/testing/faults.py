"""What can go wrong, to whom and when: values that print, compare and are drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ..engine.phases import Moment, Phase

Who = int | Literal["spare", "any"]
"""A worker: by its rank, one that is idle, or whoever is drawn."""
Connections = Literal["data", "control", "all"]
"""Of two processes: what hidden states and gradients go through, what commands go through, or both."""


@dataclass(frozen=True, slots=True)
class At:
    """When a fault happens.

    Args:
        phase: The phase that has to be reached.
        nth: For the how-many-eth time, from 1, among the moments that the rest of this describes.
        step: In :attr:`Phase.TRAINING`: how many optimizer steps were taken before; None: in any.
        action: In a step: before which action of the driver, such as ``0F2``, ``L2`` or ``0B2``; empty: as it begins.
        delay_s: How many seconds later the fault happens, while the run goes on.

    Example:
        >>> At(Phase.TRAINING, step=3).describes(Moment(Phase.TRAINING, 3))
        True
        >>> At(Phase.TRAINING, step=3).describes(Moment(Phase.TRAINING, 3, "0F0"))
        False
    """

    phase: Phase
    nth: int = 1
    step: int | None = None
    action: str = ""
    delay_s: float = 0.0

    def describes(self, moment: Moment) -> bool:
        """Whether a moment is one of those that are counted."""
        step_fits = self.step is None or self.step == moment.step
        return moment.phase == self.phase and moment.action == self.action and step_fits


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker's process ends at once (SIGKILL)."""

    at: At
    who: Who = "any"


@dataclass(frozen=True, slots=True)
class Stop:
    """A worker's process stops (SIGSTOP), for some seconds or until the end."""

    at: At
    who: Who = "any"
    for_s: float | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Two processes hear nothing of each other any more, and nobody is told: their packets are dropped.

    Connections that are made later are not cut. After ``for_s`` seconds they are repaired, and what was lost is sent
    again by the kernels.
    """

    at: At
    between: tuple[int, Who | Literal["all"]] = (0, "any")
    """Two ranks; the first driver is 0, and ``(0, "all")`` is the driver's own link."""
    for_s: float | None = None
    connections: Connections = "all"


@dataclass(frozen=True, slots=True)
class Reset:
    """The connections of two processes are reset (RST), as by a firewall that has forgotten them."""

    at: At
    between: tuple[int, Who | Literal["all"]] = (0, "any")
    connections: Connections = "data"


@dataclass(frozen=True, slots=True)
class Delay:
    """The driver takes some seconds longer to go on."""

    at: At
    for_s: float = 1.0


@dataclass(frozen=True, slots=True)
class RefuseStart:
    """The next worker processes do not start: the system refuses (EAGAIN), or they end before they have joined."""

    at: At = At(Phase.STARTING)
    count: int = 1
    ends: bool = False
    """Whether the process starts, and then ends."""


@dataclass(frozen=True, slots=True)
class FillDisk:
    """Files cannot grow beyond ``num_bytes``, for some seconds or until the pipeline has ended.

    A limit of the process (RLIMIT_FSIZE) stands in for a full disk: writes fail with EFBIG where a full one says
    ENOSPC, an ``OSError`` either way.
    """

    at: At = At(Phase.SAVING)
    num_bytes: int = 1024
    for_s: float | None = None


Fault = Kill | Stop | Cut | Reset | Delay | RefuseStart | FillDisk
Kind = Literal["kill", "stop", "cut", "reset", "refuse"]
_KINDS: Final[tuple[Kind, ...]] = ("kill", "stop", "cut", "reset", "refuse")


def random_faults(
    seed: int,
    steps: Sequence[int],
    *,
    num_workers: int,
    kinds: Sequence[Kind] = _KINDS,
    longest_delay_s: float = 0.1,
) -> tuple[Fault, ...]:
    """Draw one fault for each of the given training steps: a kind, a victim, and a moment in or after the step.

    Args:
        seed: What the same faults are drawn from again.
        steps: How many optimizer steps are taken before each.
        num_workers: The workers' ranks are 1 to this.
        kinds: What may be drawn.
        longest_delay_s: How long after the beginning of the step a fault happens at most.

    Example:
        >>> random_faults(7, [2], num_workers=3) == random_faults(7, [2], num_workers=3)
        True
    """
    rng = random.Random(seed)
    return tuple(_draw(rng, step, num_workers, kinds, longest_delay_s) for step in steps)


def _draw(rng: random.Random, step: int, num_workers: int, kinds: Sequence[Kind], longest_delay_s: float) -> Fault:
    kind = rng.choice(kinds)
    at = At(Phase.TRAINING, step=step, delay_s=rng.choice([0.0, rng.uniform(0, longest_delay_s)]))
    who: Who = rng.choice([*range(1, num_workers + 1), "spare"]) if kind in ("kill", "stop") else "any"
    if kind == "kill":
        return Kill(at, who)
    if kind == "stop":
        return Stop(at, who, rng.choice([None, rng.uniform(0.1, 1.5)]))
    if kind == "refuse":
        return RefuseStart(at, ends=rng.random() < 0.5)
    first, second = rng.sample(range(num_workers + 1), 2)
    ends = min(first, second), max(first, second)
    if kind == "reset":
        return Reset(at, ends)
    return Cut(at, ends, None if rng.random() < 0.1 else rng.uniform(0.1, 2.0), "data")
