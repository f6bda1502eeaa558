"""How the processes of a run meet: by hand, through a launcher's store, or at a supervisor that outlives the driver.

Each meeting is a value; what it opens lets workers in.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final, Protocol, Self

from ..driver.pool import WorkerPool
from ..engine.c10d import TCPStore, host_store
from ..engine.errors import SkipPipeError
from ..engine.handout import find_secret, fingerprint, leave_secret
from ..engine.job_store import JobStore
from ..engine.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, job_secret, secret_file
from ..sources import Workers, make_source
from ..sources.local import LocalSource
from ..supervisor import SupervisedProcesses, supervised
from .crew import Crew, SourceCrew, SourceWatch
from .launcher import MEET, Launcher, chosen_workers
from .network import NetworkConfig
from .roll import RollCall

_GENERATIONS: Final = 1 << 32
"""More than one driver ever forms."""
_STARTS_NONE: Final = ("launched", "kubernetes")
"""The sources that start no worker: all join by hand, or are a launcher's ranks."""


@dataclass(frozen=True, slots=True)
class DriverAddress:
    """Where a driver lets workers in, as it says in the job's store.

    >>> DriverAddress.parse(DriverAddress("10.0.0.1", 29500, "ab12").text)
    DriverAddress(host='10.0.0.1', port=29500, fingerprint='ab12')
    """

    host: str
    port: int
    fingerprint: str
    """Of the job's secret, so that a rank can tell which of several is meant."""

    @property
    def text(self) -> str:
        """What stands in the store."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: bytes | str) -> Self:
        """Read it.

        Raises:
            SkipPipeError: It is no such text.
        """
        try:
            match json.loads(text):
                case {"host": str(host), "port": int(port), "fingerprint": str(mark)}:
                    return cls(host, port, mark)
        except (ValueError, RecursionError):
            pass
        raise SkipPipeError(f"the job's store holds no address of a driver but {text[:80]!r}")

    @classmethod
    def of_rank(cls, store: TCPStore, rank: int, timeout: timedelta = MEET) -> Self:
        """Wait for the address of a driver, and return it."""
        store.wait([driver_key(rank)], timeout)
        return cls.parse(store.get(driver_key(rank)))


def driver_key(rank: int) -> str:
    """Return where in the store a driver says its address."""
    # torchrun keeps its store when it restarts all processes: each attempt needs names of its own.
    return f"skippipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/driver{rank}"


@dataclass(frozen=True, slots=True)
class Met:
    """What a driver has when its meeting is open."""

    pool: WorkerPool
    """Lets workers in."""
    crew: Crew
    """The workers that were started for this driver."""
    store_host: str
    keys: tuple[str, ...]
    """Where in the store, if there is one, the others look for this driver."""
    join: str = ""
    """What somebody has to type to join by hand; nothing where nobody can."""
    outlived: tuple[SupervisedProcesses, RollCall] | None = None
    """Under a supervisor: the workers that have outlived the driver before."""
    left: Path | None = None
    """Where the secret was left for the other ranks."""


class Meeting(Protocol):
    """A way to meet."""

    @property
    def starts_workers(self) -> bool:
        """Whether this driver has workers started, rather than wait for them."""

    def open(self) -> Met:
        """Let workers in.

        Raises:
            SkipPipeError: Somebody who is needed cannot be reached.
        """


@dataclass(frozen=True, slots=True)
class ByHand:
    """A driver that somebody has started; its workers come from a source, or by hand."""

    network: NetworkConfig
    workers: Workers
    num_drivers: int

    @property
    def starts_workers(self) -> bool:
        """See :class:`Meeting`."""
        return self.workers not in _STARTS_NONE

    def open(self) -> Met:
        """See :class:`Meeting`."""
        network, source = self.network, make_source(self.workers)
        secret = job_secret(network.secret_file, create=True)
        if secret is None:
            _need_no_secret(network, self.workers)
        host, port = source.open()
        try:
            pool = WorkerPool(
                network.host or host,
                network.port or port,
                secret=secret,
                store=host_store(network.host or host) if self.num_drivers > 1 else None,
                join_timeout_s=network.join_timeout_s,
                door=None if isinstance(source, LocalSource) else SourceWatch(source),
            )
        except BaseException:
            source.close()
            raise
        join = _join_command(pool, secret, secret_file(network.secret_file))
        return Met(pool, SourceCrew(source), pool.address[0], (driver_key(0),), join)


@dataclass(frozen=True, slots=True)
class Launched:
    """A driver among the ranks of a launcher, which has started the workers, too."""

    network: NetworkConfig
    launcher: Launcher

    @property
    def starts_workers(self) -> bool:
        """See :class:`Meeting`."""
        return False

    def open(self) -> Met:
        """See :class:`Meeting`."""
        network, launcher = self.network, self.launcher
        store = launcher.store()
        if launcher.rank == 0:
            secret = job_secret(network.secret_file, create=True)
            if secret is None:
                _need_no_secret(network, None)
        else:
            secret = secret_of(DriverAddress.of_rank(store, 0), network)
        own = network.host if launcher.rank == 0 else None  # it can be that of one machine only
        pool = WorkerPool(
            own or launcher.own_address(),
            network.port,
            secret=secret,
            store=store,
            join_timeout_s=network.join_timeout_s,
        )
        left, join = None, ""
        if launcher.rank == 0:
            left, join = leave_secret(pool.secret), _join_command(pool, secret, secret_file(network.secret_file))
        crew = SourceCrew(make_source("launched"))
        return Met(pool, crew, launcher.address, (driver_key(launcher.rank),), join, left=left)


@dataclass(frozen=True, slots=True)
class Supervised:
    """A driver under ``skippipe run``, which keeps its workers.

    Raises:
        ValueError: The settings name a file of the secret, of which the supervisor does not know.
    """

    network: NetworkConfig
    workers: Workers

    def __post_init__(self) -> None:
        if self.network.secret_file is not None:
            raise ValueError(f"under skippipe run set {SECRET_FILE_VARIABLE} instead of secret_file=...")

    @property
    def starts_workers(self) -> bool:
        """See :class:`Meeting`."""
        return self.workers not in _STARTS_NONE

    def open(self) -> Met:
        """See :class:`Meeting`."""
        network, file = self.network, os.environ.get(SECRET_FILE_VARIABLE)
        if file is None:  # the supervisor's own secret is in the other variable, of which nobody else knows
            _need_no_secret(network, self.workers)
        crew = SupervisedProcesses(f"skippipe/supervised/{network.host or ''}:{network.port}")
        host, store = crew.store()
        roll = RollCall(JobStore(crew.store()[1], host), crew.key)
        pool = WorkerPool(
            network.host or host,
            network.port,
            secret=crew.secret,
            store=store,
            join_timeout_s=network.join_timeout_s,
            door=roll,
        )
        # The store outlives this driver: its generations are others than those of the drivers before.
        pool.generations = itertools.count(crew.attempt * _GENERATIONS)
        join = _join_command(pool, file, file)
        return Met(pool, crew, host, (driver_key(0), crew.key), join, (crew, roll))


def meeting_of(network: NetworkConfig, num_drivers: int, launcher: Launcher | None) -> Meeting:
    """Return how this driver meets its workers.

    Raises:
        SkipPipeError: The settings do not go together with how this process was started.
    """
    if supervised() and (launcher is not None or num_drivers > 1):
        other = "" if launcher is None else " and another launcher"
        raise SkipPipeError(
            "skippipe run can start a driver again that was started by hand and is the only one; this run has "
            f"drivers={num_drivers}{other}: start it without skippipe run"
        )
    workers = chosen_workers(network.workers, launcher, num_drivers)
    if launcher is not None:
        return Launched(network, launcher)
    return Supervised(network, workers) if supervised() else ByHand(network, workers, num_drivers)


def secret_of(driver: DriverAddress, network: NetworkConfig) -> str:
    """Return the secret of the first driver, from this rank's environment or from where that driver has left it."""
    given = job_secret(network.secret_file)
    if given is None:
        return find_secret(driver.fingerprint)
    if fingerprint(given) != driver.fingerprint:
        raise SkipPipeError(
            f"this rank knows another secret than rank 0: give all the same {SECRET_VARIABLE}, or the same file"
        )
    return given


def _need_no_secret(network: NetworkConfig, workers: Workers | None) -> None:
    """Raise where workers join by hand, who could know none."""
    by_hand = workers in _STARTS_NONE
    if by_hand or network.local_workers is not None:
        what = f"workers={workers!r}" if by_hand else f"local_workers={network.local_workers}"
        raise ValueError(
            f"{what} leaves workers to join by hand, who must know a secret: "
            f"set secret_file=..., {SECRET_FILE_VARIABLE} or {SECRET_VARIABLE}"
        )


def _join_command(pool: WorkerPool, given: str | None, file: str | None) -> str:
    """Return how workers join by hand; nothing where no secret was ``given`` that they could know."""
    if given is None:
        return ""
    host, port = pool.address
    name = f"--secret-file {file}" if file is not None else f"(which takes {SECRET_VARIABLE} from its environment)"
    here = "; from this machine only, unless NetworkConfig(host=...) names an address of another network"
    hint = here if ipaddress.ip_address(host).is_loopback else ""
    return f"skippipe worker --join {host}:{port} {name}{hint}"
