"""The schedule as a value: actions, paths, placement and the order of actions on each rank.

Everything here is immutable data that prints, parses back, compares and dumps to JSON. What a schedule means
(which action needs which, which hop is a message) is derived here too, so that the validator, the simulator and
the engine share one reading of it. Nothing here decides an order, checks one or knows a cost.

Actions use the text form of ``torch.distributed.pipelining``: ``"2F0"`` is the forward of microbatch 0 on stage 2.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, Literal, Self, TypeVar

from skippipe_plugin.schedule.jsontext import parse

DRIVER_STAGE = 0
"""The stage of the driver's own part: embedding, head and loss."""

_T = TypeVar("_T")

_FORMAT = "skippipe-schedule"
_VERSION = 1
_NUMBER = "(0|[1-9][0-9]{0,8})"
_ACTION = re.compile(f"{_NUMBER}([FBIWL]){_NUMBER}")
_VISIT = re.compile(f"{_NUMBER}@{_NUMBER}")
_PATH = re.compile(f"{_NUMBER}:(.*)")
_HEADER = re.compile(r'schedule (".*") (training|evaluation)')
_ENTRY = re.compile(f"(stage|coupled|path|rank) {_NUMBER} =(.*)")


class ScheduleError(ValueError):
    """A schedule that cannot be read, or that cannot run."""


class Op(StrEnum):
    """What an action does: forward, backward, its input and weight halves, or the loss on the driver."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the field's letter
    W = "W"
    L = "L"


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One operation of one stage on one microbatch.

    On the driver's stage 0: ``0F`` embeds and sends to the first visit, ``0L`` runs head and loss forward and
    backward, ``0B`` runs the backward of the embedding. On a block stage: ``F`` and ``B``, or ``I`` (input gradient,
    sent on) and ``W`` (weight gradient, local) in place of ``B``.
    """

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"<stage><op><microbatch>"``.

        >>> Action.parse("2F0")
        Action(stage=2, op=<Op.F: 'F'>, microbatch=0)

        Raises:
            ScheduleError: The text is anything else; a suffix is never dropped.
        """
        match = _ACTION.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an action; write stage, one of F B I W L, microbatch, such as '2F0'")
        return cls(int(match[1]), Op(match[2]), int(match[3]))


@dataclass(frozen=True, slots=True)
class Visit:
    """One block stage of a path, and the rank (the replica) that computes it. Prints as ``"2@3"``."""

    stage: int
    rank: int

    def __str__(self) -> str:
        return f"{self.stage}@{self.rank}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"<stage>@<rank>"``; anything else raises ScheduleError."""
        match = _VISIT.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not a visit; write stage@rank, such as '2@3'")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Path:
    """The way of one microbatch: from its driver through the visits, and back to its driver for the loss.

    >>> path = Path.parse("0: 1@1 3@3")
    >>> path.stages, path.hops()
    ((1, 3), (0, 1, 3, 0))
    """

    driver: int
    visits: tuple[Visit, ...]

    @property
    def stages(self) -> tuple[int, ...]:
        """The block stages in the order they are visited."""
        return tuple(visit.stage for visit in self.visits)

    def hops(self) -> tuple[int, ...]:
        """The ranks the activation passes through: driver, visits, driver."""
        return (self.driver, *(visit.rank for visit in self.visits), self.driver)

    def __str__(self) -> str:
        return " ".join([f"{self.driver}:", *map(str, self.visits)])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``"<driver>: <stage>@<rank> ..."``; anything else raises ScheduleError."""
        match = _PATH.fullmatch(text.strip())
        if match is None:
            raise ScheduleError(f"{text!r} is not a path; write driver, colon, visits, such as '0: 1@1 2@2'")
        return cls(int(match[1]), tuple(map(Visit.parse, match[2].split())))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Where stages live, which way each microbatch goes, and what each rank does in which order.

    Ranks 0..D-1 are drivers. Building one checks nothing: a schedule is a value, `validate` judges it.
    """

    placement: tuple[tuple[int, ...], ...]
    """By stage: the ranks that hold it. Entry 0 is the drivers; several ranks are replicas, none is a hole."""
    paths: tuple[Path, ...]
    """By microbatch."""
    orders: tuple[tuple[Action, ...], ...]
    """By rank: its actions in the order it runs them."""
    backward: bool = True
    """False for evaluation: only ``0F``, ``kF`` and ``0L`` occur."""
    name: str = ""
    coupled: tuple[tuple[int, ...], ...] = ()
    """Groups of workers that hold the same stages and run the actions of these together, each on a microbatch of its
    own, as expert parallelism must; see `skippipe_plugin.schedule.couple`."""

    @property
    def num_stages(self) -> int:
        """The number of block stages; the driver's stage 0 is not counted."""
        return len(self.placement) - 1

    @property
    def num_ranks(self) -> int:
        """The number of drivers and workers."""
        return len(self.orders)

    @property
    def num_microbatches(self) -> int:
        """The number of microbatches of all drivers together."""
        return len(self.paths)

    @property
    def drivers(self) -> tuple[int, ...]:
        """The driver ranks."""
        return self.placement[DRIVER_STAGE]

    def __str__(self) -> str:
        mode = "training" if self.backward else "evaluation"
        lines = [f"schedule {json.dumps(self.name)} {mode}"]
        lines += (_join(f"stage {i} =", ranks) for i, ranks in enumerate(self.placement))
        lines += (_join(f"coupled {i} =", ranks) for i, ranks in enumerate(self.coupled))
        lines += (f"path {i} = {path}" for i, path in enumerate(self.paths))
        lines += (_join(f"rank {i} =", order) for i, order in enumerate(self.orders))
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what ``str(schedule)`` writes; blank lines and lines that start with ``#`` are skipped.

        Raises:
            ScheduleError: A line is not understood; the message quotes it.
        """
        lines = [line.strip() for line in text.split("\n")]
        lines = [line for line in lines if line and not line.startswith("#")]
        header = _HEADER.fullmatch(lines[0]) if lines else None
        if header is None:
            raise ScheduleError('a schedule starts with the line: schedule "name" training (or: evaluation)')
        entries = _read_entries(lines[1:])
        return cls(
            placement=tuple(_read_ranks(entry) for entry in entries["stage"]),
            paths=tuple(map(Path.parse, entries["path"])),
            orders=tuple(_read_order(entry.split()) for entry in entries["rank"]),
            backward=header[2] == "training",
            name=_read_json(header[1], str),
            coupled=tuple(_read_ranks(entry) for entry in entries["coupled"]),
        )

    def to_json(self) -> str:
        """Return the schedule as one line of JSON."""
        return json.dumps(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "name": self.name,
                "backward": self.backward,
                "placement": self.placement,
                "coupled": self.coupled,
                "paths": [str(path) for path in self.paths],
                "orders": [[str(action) for action in order] for order in self.orders],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` writes, also under the key ``schedule`` of a plan file.

        Raises:
            ScheduleError: Not JSON, another format or version, or a key that is missing or of the wrong type.
        """
        data = _read_json(text, dict)
        if isinstance(data.get("schedule"), dict):
            data = data["schedule"]
        cls.check_version(data)
        coupled = _get({"coupled": [], **data}, "coupled", list)
        return cls(
            placement=tuple(tuple(_items(ranks, int)) for ranks in _items(_get(data, "placement", list), list)),
            paths=tuple(map(Path.parse, _items(_get(data, "paths", list), str))),
            orders=tuple(_read_order(_items(order, str)) for order in _items(_get(data, "orders", list), list)),
            backward=_get(data, "backward", bool),
            name=_get(data, "name", str),
            coupled=tuple(tuple(_items(ranks, int)) for ranks in _items(coupled, list)),
        )

    @staticmethod
    def check_version(data: Mapping[str, Any]) -> None:  # Any: JSON
        """Raise ScheduleError for what is of another format or version."""
        if (data.get("format"), data.get("version")) != (_FORMAT, _VERSION):
            raise ScheduleError(
                f"not a {_FORMAT} of version {_VERSION}: {data.get('format')!r} {data.get('version')!r}"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the schedule to a file as JSON."""
        FilePath(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that `save` wrote, or a plan file; raises ScheduleError like `from_json`."""
        return cls.from_json(FilePath(path).read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on its way between two different ranks: an activation forward, or a gradient backward."""

    producer: Action
    consumer: Action
    source: int
    destination: int
    direction: Literal["forward", "backward"]

    @property
    def activation_stage(self) -> int:
        """The stage whose output this is, or whose output's gradient: the tensor has that activation's size."""
        return self.producer.stage if self.direction == "forward" else self.consumer.stage


def split_visits(orders: Iterable[Iterable[Action]]) -> frozenset[tuple[int, int]]:
    """Return the (stage, microbatch) pairs whose backward runs in halves, I and W."""
    halves = (Op.I, Op.W)
    return frozenset((action.stage, action.microbatch) for order in orders for action in order if action.op in halves)


def chain(
    path: Path, microbatch: int, *, backward: bool = True, split: AbstractSet[tuple[int, int]] = frozenset()
) -> list[tuple[Action, int]]:
    """Return the actions that one microbatch passes through, each with its rank; each needs the one before it.

    ``W`` is not in the chain: nothing waits for it.

    Args:
        path: The microbatch's path.
        microbatch: Its number.
        backward: Whether to come back after the loss.
        split: The (stage, microbatch) pairs whose input gradient is ``I`` rather than part of ``B``.
    """
    forward = [(Action(visit.stage, Op.F, microbatch), visit.rank) for visit in path.visits]
    steps = [(Action(DRIVER_STAGE, Op.F, microbatch), path.driver), *forward]
    steps.append((Action(DRIVER_STAGE, Op.L, microbatch), path.driver))
    if backward:
        for visit in reversed(path.visits):
            op = Op.I if (visit.stage, microbatch) in split else Op.B
            steps.append((Action(visit.stage, op, microbatch), visit.rank))
        steps.append((Action(DRIVER_STAGE, Op.B, microbatch), path.driver))
    return steps


def chains(schedule: Schedule) -> Iterator[list[tuple[Action, int]]]:
    """Yield the chain of each microbatch, in the order of their numbers."""
    split = split_visits(schedule.orders)
    for microbatch, path in enumerate(schedule.paths):
        yield chain(path, microbatch, backward=schedule.backward, split=split)


def rank_of(schedule: Schedule) -> dict[Action, int]:
    """Map each action that the paths need to the rank on which they need it; the orders play no part in *where*."""
    ranks: dict[Action, int] = {}
    for steps in chains(schedule):
        for action, rank in steps:
            ranks[action] = rank
            if action.op is Op.I:
                ranks[Action(action.stage, Op.W, action.microbatch)] = rank
    return ranks


def dependencies(schedule: Schedule) -> dict[Action, tuple[Action, ...]]:
    """Map each action that the paths need to the actions whose results it takes (none for ``0F``, else one).

    >>> schedule = Schedule(((0,), (1,)), (Path.parse("0: 1@1"),), ((), ()), backward=False)
    >>> {str(action): [str(needed) for needed in inputs] for action, inputs in dependencies(schedule).items()}
    {'0F0': [], '1F0': ['0F0'], '0L0': ['1F0']}
    """
    inputs: dict[Action, tuple[Action, ...]] = {}
    for steps in chains(schedule):
        inputs[steps[0][0]] = ()
        for (producer, _), (consumer, _) in pairwise(steps):
            inputs[consumer] = (producer,)
            if consumer.op is Op.I:
                inputs[Action(consumer.stage, Op.W, consumer.microbatch)] = (consumer,)
    return inputs


def messages(schedule: Schedule) -> list[Message]:
    """List the messages of a schedule, by microbatch and then along its chain; hops inside a rank are none."""
    result: list[Message] = []
    for steps in chains(schedule):
        for (producer, source), (consumer, destination) in pairwise(steps):
            if source != destination:
                direction: Literal["forward", "backward"] = "forward" if consumer.op in (Op.F, Op.L) else "backward"
                result.append(Message(producer, consumer, source, destination, direction))
    return result


def _join(head: str, items: Iterable[object]) -> str:
    return " ".join([head, *map(str, items)])


def _read_entries(lines: Iterable[str]) -> dict[str, list[str]]:
    """Sort the lines ``kind number = text`` by kind; the numbers of a kind must count up from 0."""
    entries: dict[str, list[str]] = {"stage": [], "coupled": [], "path": [], "rank": []}
    for line in lines:
        match = _ENTRY.fullmatch(line)
        if match is None:
            raise ScheduleError(
                f"cannot read the line {line!r}; write 'stage N = ...', 'path N = ...' or 'rank N = ...' (or, where "
                "ranks work together, 'coupled N = ...')"
            )
        known = entries[match[1]]
        if int(match[2]) != len(known):
            raise ScheduleError(f"expected {match[1]} {len(known)} next, got the line {line!r}")
        known.append(match[3])
    return entries


def _read_ranks(text: str) -> tuple[int, ...]:
    for word in text.split():
        if not re.fullmatch(_NUMBER, word):
            raise ScheduleError(f"{word!r} in a placement is not a rank")
    return tuple(map(int, text.split()))


def _read_order(words: Iterable[str]) -> tuple[Action, ...]:
    return tuple(map(Action.parse, words))


def _read_json(text: str, kind: type[_T]) -> _T:
    try:
        data = parse(text)
    except ValueError as error:
        raise ScheduleError(f"not JSON: {error}") from error
    if not isinstance(data, kind):
        raise ScheduleError(f"expected a JSON {kind.__name__}, got {type(data).__name__}")
    return data


def _get(data: Mapping[str, Any], key: str, kind: type[_T]) -> _T:  # Any: JSON
    if not isinstance(data.get(key), kind):
        raise ScheduleError(f"the key {key!r} must hold a {kind.__name__}, not {data.get(key)!r}")
    value: _T = data[key]
    return value


def _items(values: Iterable[Any], kind: type[_T]) -> Iterator[_T]:  # Any: JSON
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ScheduleError(f"expected a {kind.__name__} in a list of the schedule, got {value!r}")
        yield value
