"""This process's place in a run: which ranks it commands, and how the processes of the run find each other.

A driver that was started by hand starts its workers (and further drivers) itself. Under a launcher such as torchrun
the processes are there already and meet through the launcher's store. Either way workers belong to the *process*, not
to a Trainer: the next ``fit`` takes them over, so this module keeps the one registry of jobs. It is emptied when the
interpreter ends; workers also end by themselves when their driver is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import itertools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import cloudpickle

from ..driver.links import Link
from ..driver.pool import EndedEarly, WorkerPool
from ..driver.rendezvous import Rendezvous
from ..engine.c10d import TCPStore, host_store
from ..engine.channel import connect
from ..engine.control.line import to_driver
from ..engine.control.presence import Hello, Release
from ..engine.errors import SkipPipeError, StartRefused
from ..engine.handout import find_secret, fingerprint, leave_secret
from ..engine.job_store import JobStore
from ..engine.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, job_secret, secret_file
from ..engine.versions import own_versions
from ..job.network import NetworkConfig
from ..sources import Door, WorkerSource, make_source, workers_of
from ..sources.local import LocalSource
from ..supervisor import SupervisedProcesses, supervised
from ..worker import DriverProcesses, Worker
from .crew import Crew, SourceCrew, SourceWatch
from .fits import Fits
from .launcher import MEET, Launcher, chosen_workers
from .roll import RollCall, drop

log = logging.getLogger(__name__)

_SAY_S: Final = 5.0
"""After how many seconds a wait says what it waits for."""
_LOOK_S: Final = 0.05
_TRIES_AFTER_S: Final = (0.5, 1.0, 2.0, 4.0)
"""The pauses before a replacement is tried again that did not start."""
_GENERATIONS: Final = 1 << 32
"""More than one driver ever forms."""


class DriverJob:
    """The part of a driver: its pool of workers, and the other drivers."""

    def __init__(self, network: NetworkConfig, num_drivers: int, launcher: Launcher | None) -> None:
        self.rank = launcher.rank if launcher is not None else 0
        self.num_drivers = num_drivers
        self._network = network
        self._launcher = launcher
        if supervised() and (launcher is not None or num_drivers > 1):
            other = "" if launcher is None else " and another launcher"
            raise SkipPipeError(
                "skippipe run can start a driver again that was started by hand and is the only one; this run has "
                f"drivers={num_drivers}{other}: start it without skippipe run"
            )
        self._workers = workers = chosen_workers(network.workers, launcher, num_drivers)
        self._starts_none = workers in ("launched", "kubernetes")
        self._crew: Crew
        self._drivers = DriverProcesses()
        given = self._given_secret()
        limit_s = network.join_timeout_s
        if launcher is None and supervised():
            self._crew = SupervisedProcesses(_supervised_key(network))
            self._store_host, store = self._crew.store()
            roll = RollCall(JobStore(self._crew.store()[1], self._store_host), self._crew.key)
            host = network.host or self._store_host
            self.pool = WorkerPool(
                host, network.port, secret=self._crew.secret, store=store, join_timeout_s=limit_s, door=roll
            )
            # The store outlives this driver: its generations are others than those of the drivers before.
            self.pool.generations = itertools.count(self._crew.attempt * _GENERATIONS)
        elif launcher is None:
            self._crew, self.pool = _staffed(make_source(workers), network, given, meets=num_drivers > 1)
            self._store_host = self.pool.address[0]
        else:
            self._crew = SourceCrew(make_source("launched"))
            store = launcher.store()
            secret = given if self.rank == 0 else _secret_of(_get(store, _driver_key(0)), network)
            own = network.host if self.rank == 0 else None  # it can be that of one machine only
            self.pool = WorkerPool(
                own or launcher.own_address(), network.port, secret=secret, store=store, join_timeout_s=limit_s
            )
            self._store_host = launcher.address
        self._left = leave_secret(self.pool.secret) if launcher is not None and self.rank == 0 else None
        self._publish()
        if given is not None:
            log.warning("workers may join this job by hand: %s", self._how_to_join())
        self.fits: Fits | None = None
        """Under a supervisor: what the drivers before this one have left."""
        if isinstance(self._crew, SupervisedProcesses):
            self.fits = Fits(self.pool, self._crew, roll)

    @property
    def store(self) -> TCPStore:
        """Where the processes of this job meet; a driver that is alone, and owns its workers, has none."""
        assert self.pool.store is not None, "a lone driver meets nobody"
        return self.pool.store

    def prepare(self, num_workers: int) -> None:
        """Start what is missing to have ``num_workers`` idle workers soon; returns at once."""
        if self._launcher is not None:
            return
        missing = 0 if self._starts_none else self._num_missing(num_workers)
        if self._network.local_workers is not None:
            missing = min(missing, self._network.local_workers - len(self._crew.running()))
        if missing > 0:
            host, port = self.pool.address
            self._crew.start(missing, Door(host, port, self.pool.secret))
        if self.num_drivers > 1:
            ranks, count = range(1, self.num_drivers), self.num_drivers + num_workers
            self._drivers.start(ranks, count, self._store_host, self.store.port, self.pool.secret)
            self._await_drivers()

    def _await_drivers(self) -> None:
        """Wait until the drivers that were started here have come as far as this one.

        Raises:
            SkipPipeError: One has ended before.
        """
        keys, begun_s, told = [_driver_key(rank) for rank in range(1, self.num_drivers)], time.monotonic(), False
        while not self.store.check(keys):
            if ended := self._drivers.ended():
                raise SkipPipeError(
                    f"further drivers ended before they had joined (pid: exit status): {ended}; each runs this script "
                    "once more, and says above why it ended"
                )
            waited_s = time.monotonic() - begun_s
            if waited_s > MEET.total_seconds():
                raise SkipPipeError(f"further drivers did not come to fit within {MEET}; look at what they print")
            if waited_s > _SAY_S and not told:
                log.warning("waiting for %d further drivers, which run this script up to here", len(keys))
                told = True
            time.sleep(_LOOK_S)

    def acquire(self, num_workers: int) -> list[Link]:
        """Return ``num_workers`` workers, waiting for them to join."""
        self._crew.reap()
        self.pool.rouse(num_workers)
        if self.rank == 0:
            self.prepare(num_workers)
            if self._launcher is None and (awaited := self._num_missing(num_workers)) > 0:
                log.warning(
                    "waiting up to %g s for %d more of %d workers, which join by hand: %s",
                    *(self._network.join_timeout_s, awaited, num_workers, self._how_to_join()),
                )
        return self.pool.acquire(num_workers, lambda: self._crew.ended_early(self.pool.joined))

    def idle(self) -> list[Link]:
        """Return the workers that are ready and unused."""
        return self.pool.idle()

    def resting(self) -> list[Link]:
        """Return the workers that are unused, whether they are awake or not."""
        return self.pool.resting()

    def joined(self) -> list[Link]:
        """Return the workers that joined by hand and are ready and unused."""
        return [link for link in self.pool.idle() if link.name]

    def num_coming(self) -> int:
        """Return how many workers are being started."""
        return self._crew.num_starting(self.pool.joined)

    def starting(self) -> set[int]:
        """Return the process ids of the workers of this host that were started and have not joined yet."""
        return {int(ticket) for ticket in {*self._crew.running()} - self.pool.joined if ticket.isdecimal()}

    def lend(self, links: Sequence[Link]) -> None:
        """Let these idle workers be used, and no others."""
        self.pool.take(links)

    def take_back(self, links: Sequence[Link]) -> None:
        """Have these workers idle again; what they hold is of no use any more."""
        for link in links:
            drop(link)
        self.pool.release(links)

    def take(self, num_workers: int) -> list[Link]:
        """Return workers that replace others; one that does not start, or ends before it has joined, is tried again.

        A host that is out of processes or memory may have some a moment later, and a run would be lost.
        """
        for pause_s in _TRIES_AFTER_S:
            try:
                return self.acquire(num_workers)
            except (EndedEarly, StartRefused) as error:
                log.warning("%s; trying again in %g s", error, pause_s)
            time.sleep(pause_s)
        return self.acquire(num_workers)

    def fence(self, link: Link) -> None:
        """End the process of a lost worker, if this driver has started it and it is there still."""
        if link.ticket:
            self._crew.kill(link.ticket)

    def rendezvous(self) -> Rendezvous:
        """Return what workers need to find everybody."""
        others = [_get(self.store, _driver_key(rank)) for rank in range(1, self.num_drivers)]
        self._take_back()  # all are here
        addresses = tuple((other["host"], other["port"]) for other in others)
        port = self.store.port if self.pool.store is not None else 0
        return Rendezvous(self.pool.address[0], self._store_host, port, addresses)

    def dismiss(self, results: Mapping[str, Any]) -> None:
        """Let the launcher's worker ranks return from their Trainer call with the driver's ``results``."""
        if self._launcher is not None and self.rank == 0:
            for link in self.pool.links:
                link.tell(Release(cloudpickle.dumps(results)))

    def close(self) -> None:
        """End all workers, and wait for the other drivers that were started here."""
        self._take_back()
        self._drivers.wait()
        self.pool.close()
        self._crew.stop()

    def _take_back(self) -> None:
        """Remove the secret that was left for the other ranks."""
        if self._left is not None:
            self._left.unlink(missing_ok=True)
            self._left = None

    def _num_missing(self, num_workers: int) -> int:
        """How many of ``num_workers`` are neither here and idle nor on their way."""
        return num_workers - self.pool.num_idle - self._crew.num_starting(self.pool.joined)

    def _how_to_join(self) -> str:
        host, port = self.pool.address
        file = os.environ.get(SECRET_FILE_VARIABLE) if supervised() else secret_file(self._network.secret_file)
        name = f"--secret-file {file}" if file is not None else f"(which takes {SECRET_VARIABLE} from its environment)"
        here = "; from this machine only, unless NetworkConfig(host=...) names an address of another network"
        hint = here if ipaddress.ip_address(host).is_loopback else ""
        return f"skippipe worker --join {host}:{port} {name}{hint}"

    def _given_secret(self) -> str | None:
        """Return the secret that the user has set, so that workers may join by hand; None when there is none."""
        network = self._network
        if supervised() and network.secret_file is not None:
            raise ValueError(f"under skippipe run set {SECRET_FILE_VARIABLE} instead of secret_file=...")
        is_set = not supervised() or SECRET_FILE_VARIABLE in os.environ  # the supervisor sets the other one by itself
        secret = job_secret(network.secret_file, create=True) if self.rank == 0 and is_set else None
        by_hand = self._starts_none and self._launcher is None
        if secret is None and self.rank == 0 and (network.local_workers is not None or by_hand):
            what = f"workers={self._workers!r}" if by_hand else f"local_workers={network.local_workers}"
            raise ValueError(
                f"{what} leaves workers to join by hand, who must know a secret: "
                f"set secret_file=..., {SECRET_FILE_VARIABLE} or {SECRET_VARIABLE}"
            )
        return secret

    def _publish(self) -> None:
        if self.pool.store is None:
            return
        host, port = self.pool.address
        entry = {"host": host, "port": port, "fingerprint": fingerprint(self.pool.secret)}
        self.pool.store.set(_driver_key(self.rank), json.dumps(entry))
        if isinstance(self._crew, SupervisedProcesses):
            self.pool.store.set(self._crew.key, json.dumps(entry))


def _staffed(
    source: WorkerSource, network: NetworkConfig, secret: str | None, *, meets: bool
) -> tuple[SourceCrew, WorkerPool]:
    """Open a source, and the door for its workers; host a store too where this driver ``meets`` others."""
    host, port = source.open()
    try:
        pool = WorkerPool(
            network.host or host,
            network.port or port,
            secret=secret,
            store=host_store(network.host or host) if meets else None,
            join_timeout_s=network.join_timeout_s,
            door=None if isinstance(source, LocalSource) else SourceWatch(source),
        )
    except BaseException:
        source.close()
        raise
    return SourceCrew(source), pool


class WorkerJob:
    """The part of a launcher's rank that is not a driver: it serves while its driver trains."""

    def __init__(self, launcher: Launcher, network: NetworkConfig) -> None:
        first = _get(launcher.store(), _driver_key(0))
        channel = connect(first["host"], first["port"], bytes.fromhex(_secret_of(first, network)))
        to_driver(channel).send(Hello(own_versions(), os.getpid(), launcher.rank))
        self._worker = Worker(channel)

    def serve(self) -> dict[str, Any]:
        """Work until the driver's Trainer call is over; return its results.

        Raises:
            SkipPipeError: The driver's call failed.
        """
        with _signals_left_to_the_driver(self._worker):
            results = self._worker.serve()
        if results is None or "error" in results:
            raise SkipPipeError(f"the driver (rank 0) failed: {(results or {}).get('error', 'it left')}")
        return results

    def serve_until_exit(self) -> None:
        """Work until the driver's process ends.

        Raises:
            DriverGone: It ended without a farewell.
        """
        with _signals_left_to_the_driver(self._worker):
            while self._worker.serve() is not None:
                pass

    def close(self) -> None:
        """Close the connection to the driver."""
        self._worker.close()


@contextlib.contextmanager
def _signals_left_to_the_driver(worker: Worker) -> Iterator[None]:
    """Outlive the signals that a launcher sends to all ranks: the driver may still want to write a checkpoint.

    A worker rank ends with its driver anyway. With recovery it asks to be relieved of its stages on SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():  # handlers can be set there only
        yield
        return
    handlers: dict[signal.Signals, Any] = {  # Any: a function or one of signal's constants
        signal.SIGTERM: lambda *_: worker.leave(),
        signal.SIGUSR1: signal.SIG_IGN,  # SLURM's warning before the time limit, in Lightning
        signal.SIGUSR2: signal.SIG_IGN,
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_registry: dict[tuple[object, ...], DriverJob | WorkerJob] = {}


def driver_job(network: NetworkConfig, num_drivers: int, launcher: Launcher | None) -> DriverJob:
    """Return this process's job as a driver, the same one for the same arguments."""
    key = ("driver", network, num_drivers, workers_of(network.workers))
    if key not in _registry:
        _register(key, DriverJob(network, num_drivers, launcher))
    job = _registry[key]
    assert isinstance(job, DriverJob)
    return job


def driver_jobs() -> list[DriverJob]:
    """Return the jobs that this process drives."""
    return [job for job in _registry.values() if isinstance(job, DriverJob)]


def worker_job(launcher: Launcher, network: NetworkConfig | None = None) -> WorkerJob:
    """Return this process's job as a worker rank of a launcher."""
    if ("worker",) not in _registry:
        _register(("worker",), WorkerJob(launcher, network or NetworkConfig()))
    job = _registry["worker",]
    assert isinstance(job, WorkerJob)
    return job


def stop_workers() -> None:
    """End the worker processes that this process started; a later ``fit`` starts new ones."""
    while _registry:
        _, job = _registry.popitem()
        job.close()


def _register(key: tuple[object, ...], job: DriverJob | WorkerJob) -> None:
    if not _registry:
        atexit.unregister(stop_workers)
        atexit.register(stop_workers)
    _registry[key] = job


def _supervised_key(network: NetworkConfig) -> str:
    """Tell the jobs of one script apart, alike on every host where it may be started."""
    return f"skippipe/supervised/{network.host or ''}:{network.port}"


def _driver_key(rank: int) -> str:
    # torchrun keeps its store when it restarts all processes: each attempt needs names of its own.
    return f"skippipe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/driver{rank}"


def _secret_of(driver: Mapping[str, Any], network: NetworkConfig) -> str:
    """Return the secret of the first driver, from this rank's environment or from where that driver has left it."""
    given = job_secret(network.secret_file)
    if given is None:
        return find_secret(driver["fingerprint"])
    if fingerprint(given) != driver["fingerprint"]:
        raise SkipPipeError(
            f"this rank knows another secret than rank 0: give all the same {SECRET_VARIABLE}, or the same file"
        )
    return given


def _get(store: TCPStore, key: str) -> dict[str, Any]:
    store.wait([key], MEET)
    entry: dict[str, Any] = json.loads(store.get(key))
    return entry
