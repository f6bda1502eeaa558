"""What stands where in the store of a job under ``skippipe run``: it outlives drivers, and others read in it.

The supervisor hosts it. Drivers write where they are and which workers joined by hand; workers look the next driver up;
a supervisor that stands by on another host copies what it needs to take the job over.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from .c10d import TCPStore
from .silence import silence_ends_after

Address = tuple[str, int]

_ANSWERS: Final = timedelta(seconds=20)
_REACHED_S: Final = 2.0
_SILENT_S: Final = 6.0
_ATTEMPT: Final = "skippipe/attempt"
_FINGERPRINT: Final = "skippipe/fingerprint"
_STANDBYS: Final = "skippipe/standbys"
_KEYS: Final = "skippipe/keys"
_CALLERS: Final = "skippipe/callers"
_OVER: Final = "skippipe/over"
_TOLD: Final = "skippipe/told"


@dataclass(frozen=True, slots=True)
class Members:
    """The workers that joined one driver, and those after it, by hand."""

    number: int = 0
    """How many lists there were before: of two the higher one counts."""
    names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class JobState:
    """What another supervisor must know to take a job over."""

    attempt: int = 0
    """How many drivers there were before the present one."""
    members: Mapping[str, Members] = field(default_factory=dict)
    """By where drivers write their addresses."""

    @property
    def names(self) -> frozenset[str]:
        """All workers that joined by hand."""
        return frozenset(name for members in self.members.values() for name in members.names)

    def learn(self, told: Iterable[tuple[str, Members]]) -> JobState:
        """Return what is known with the lists that others have, where those are newer."""
        members = dict(self.members)
        for key, other in told:
            if key not in members or other.number > members[key].number:
                members[key] = other
        return JobState(self.attempt, members)


class JobStore:
    """One end of the store; whatever is asked of a store that is gone is a RuntimeError.

    Args:
        store: Connected.
        host: Where it is, as others reach it.
    """

    def __init__(self, store: TCPStore, host: str) -> None:
        self._store = store
        self.address: Address = (host, store.port)

    @classmethod
    def reach(cls, host: str, port: int) -> JobStore:
        """Connect to the store of another process.

        Raises:
            OSError: Nobody listens there, or nobody answers.
            RuntimeError: Who listens is no store.
        """
        socket.create_connection((host, port), timeout=_REACHED_S).close()  # torch would try for long
        with silence_ends_after(_SILENT_S):
            return cls(TCPStore(host, port, is_master=False, timeout=_ANSWERS), host)

    # ------------------------------------------------------------- the supervisor

    def begin(self, fingerprint: str) -> None:
        """Say which secret the job has, by its fingerprint."""
        self._store.set(_FINGERPRINT, fingerprint)

    def fingerprint(self) -> str:
        """Return the fingerprint of the job's secret."""
        return self._store.get(_FINGERPRINT).decode()

    def put(self, state: JobState) -> None:
        """Take a job over, or note that another driver begins."""
        self._store.set(_ATTEMPT, str(state.attempt))
        for key, members in state.members.items():
            self.note_members(key, members)

    def state(self) -> JobState:
        """Return what :meth:`put` and :meth:`note_members` have put there."""
        keys = self._lines(_KEYS)
        return JobState(int(self._get(_ATTEMPT) or 0), {key: self.members(key) for key in keys})

    def end(self, status: int) -> None:
        """Say that the job is over, and with which exit status."""
        self._store.set(_OVER, str(status))

    def num_told(self) -> int:
        """Return how many that stand by have read that the job is over."""
        return self._store.add(_TOLD, 0)

    # ----------------------------------------------------------------- who stands by

    def stand_by(self, address: Address) -> None:
        """Say where the store of a supervisor is that stands by."""
        self._append(_STANDBYS, json.dumps(address))

    def standbys(self) -> list[Address]:
        """Return the stores of those that stand by, in the order in which they came."""
        return [(host, port) for host, port in map(json.loads, self._lines(_STANDBYS))]

    def ended(self) -> int | None:
        """Return the exit status of a job that is over, and note that it was read."""
        status = self._get(_OVER)
        if status is None:
            return None
        self._store.add(_TOLD, 1)
        return int(status)

    # ------------------------------------------------------------------- drivers, workers

    def members(self, key: str) -> Members:
        """Return the workers that joined the driver of ``key`` by hand."""
        said = self._get(_members_key(key))
        return Members() if said is None else Members(*json.loads(said))

    def note_members(self, key: str, members: Members) -> None:
        """Replace what :meth:`members` returns."""
        self._store.set(_members_key(key), json.dumps([members.number, [*members.names]]))
        if key not in self._lines(_KEYS):
            self._append(_KEYS, key)

    def driver(self, key: str) -> Address | None:
        """Return where the driver of ``key`` listens, or the last one has."""
        said = self._get(key)
        if said is None:
            return None
        address = json.loads(said)
        return address["host"], address["port"]

    def call(self, name: str, key: str, members: Members) -> None:
        """Say that the worker ``name`` has lost its driver and does not reach the store that it should ask.

        It says too of whom it knows, since who stands by may have looked before some had joined.
        """
        self._store.set(_told_key(name), json.dumps([key, members.number, [*members.names]]))
        if self._store.add(_calls_key(name), 1) == 1:
            self._append(_CALLERS, name)

    def calls(self) -> dict[str, int]:
        """Return how often each worker that ever said so has said it."""
        return {name: self._store.add(_calls_key(name), 0) for name in self._lines(_CALLERS)}

    def told_by(self, name: str) -> tuple[str, Members]:
        """Return the list of members, and of which driver they are, that a worker has told that called."""
        key, number, names = json.loads(self._store.get(_told_key(name)))
        return key, Members(number, names)

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _append(self, key: str, line: str) -> None:
        self._store.append(key, f"{line}\n")  # type: ignore[attr-defined] # torch's stubs lack it

    def _lines(self, key: str) -> list[str]:
        return (self._get(key) or "").splitlines()


def _members_key(key: str) -> str:
    return f"{key}/by hand"


def _calls_key(name: str) -> str:
    return f"skippipe/calls/{name}"


def _told_key(name: str) -> str:
    return f"skippipe/calls/{name}/told"
