"""This process's place in a run: which ranks it commands, and how the processes of the run find each other.

A driver that was started by hand starts its workers (and further drivers) itself. Under a launcher such as torchrun
the processes are there already and meet through the launcher's store. Either way workers belong to the *process*, not
to a Trainer: the next ``fit`` takes them over, so this module keeps the one registry of jobs. It is emptied when the
interpreter ends; workers also end by themselves when their driver is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import cloudpickle

from ..driver.links import Link
from ..driver.pool import EndedEarly, WorkerPool
from ..driver.rendezvous import Rendezvous
from ..engine.c10d import TCPStore
from ..engine.channel import connect
from ..engine.control.line import to_driver
from ..engine.control.presence import Hello, Release
from ..engine.device import own_place
from ..engine.errors import SkipPipeError, StartRefused
from ..engine.handout import fingerprint
from ..engine.pairs import prepare
from ..engine.versions import own_versions
from ..job.network import NetworkConfig
from ..sources import Door, workers_of
from ..worker import DriverProcesses, Worker
from .crew import Crew
from .fits import Fits
from .launcher import MEET, Launcher
from .meetings import DriverAddress, Meeting, Met, driver_key, meeting_of, secret_of
from .roll import drop

log = logging.getLogger(__name__)

_SAY_S: Final = 5.0
"""After how many seconds a wait says what it waits for."""
_LOOK_S: Final = 0.05
_TRIES_AFTER_S: Final = (0.5, 1.0, 2.0, 4.0)
"""The pauses before a replacement is tried again that did not start."""


class DriverJob:
    """The part of a driver: its pool of workers, and the other drivers.

    Args:
        meeting: How it meets its workers.
        network: The user's settings.
        num_drivers: How many drivers the run has.
        rank: Which of them this is.
        launched: Whether a launcher has started the workers, and the other drivers.
    """

    def __init__(
        self, meeting: Meeting, network: NetworkConfig, num_drivers: int = 1, rank: int = 0, *, launched: bool = False
    ) -> None:
        self.rank = rank
        self.num_drivers = num_drivers
        self.fits: Fits | None = None
        """Under a supervisor: what the drivers before this one have left."""
        self._meeting = meeting
        self._network = network
        self._launched = launched
        self._drivers = DriverProcesses()
        self._open: Met | None = None
        self._resting: list[weakref.finalize[Any, Any]] = []
        """Notice that nobody refers to a model any more whose blocks stay on workers."""
        self._deserted: list[Callable[[], None]] = []
        """Free the workers of such models. Whatever thread notices it may hold any lock, so that is done later."""

    def open(self) -> None:
        """Let workers in, and say where."""
        prepare(self._network.backend)
        self._open = met = self._meeting.open()
        try:
            if met.pool.store is not None:
                address = DriverAddress(*met.pool.address, fingerprint(met.pool.secret))
                for key in met.keys:
                    met.pool.store.set(key, address.text)
            if met.join:
                log.warning("workers may join this job by hand: %s", met.join)
            if met.outlived is not None:
                self.fits = Fits(met.pool, *met.outlived)
        except BaseException:
            self.close()
            raise

    @property
    def _met(self) -> Met:
        assert self._open is not None, "the job is not open"
        return self._open

    @property
    def crew(self) -> Crew:
        """The workers that were started for this driver."""
        return self._met.crew

    @property
    def pool(self) -> WorkerPool:
        """The workers that are here."""
        return self._met.pool

    @property
    def store(self) -> TCPStore:
        """Where the processes of this job meet; a driver that is alone, and owns its workers, has none."""
        assert self.pool.store is not None, "a lone driver meets nobody"
        return self.pool.store

    def prepare(self, num_workers: int) -> None:
        """Start what is missing to have ``num_workers`` idle workers soon; returns at once."""
        if self._launched:
            return
        self._free_deserted(num_workers)
        missing = self._num_missing(num_workers) if self._meeting.starts_workers else 0
        if self._network.local_workers is not None:
            missing = min(missing, self._network.local_workers - len(self.crew.running()))
        if missing > 0:
            host, port = self.pool.address
            self.crew.start(missing, Door(host, port, self.pool.secret))
        if self.num_drivers > 1:
            ranks, count = range(1, self.num_drivers), self.num_drivers + num_workers
            self._drivers.start(ranks, count, self._met.store_host, self.store.port, self.pool.secret)
            self._await_drivers()

    def _await_drivers(self) -> None:
        """Wait until the drivers that were started here have come as far as this one.

        Raises:
            SkipPipeError: One has ended before.
        """
        keys, begun_s, told = [driver_key(rank) for rank in range(1, self.num_drivers)], time.monotonic(), False
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
        self.crew.reap()
        self.pool.rouse(num_workers)
        if self.rank == 0:
            self.prepare(num_workers)
            if not self._launched and (awaited := self._num_missing(num_workers)) > 0:
                log.warning(
                    "waiting up to %g s for %d more of %d workers, which join by hand: %s",
                    *(self._network.join_timeout_s, awaited, num_workers, self._met.join),
                )
        return self.pool.acquire(num_workers, lambda: self.crew.ended_early(self.pool.joined))

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
        return self.crew.num_starting(self.pool.joined)

    def starting(self) -> set[int]:
        """Return the process ids of the workers of this host that were started and have not joined yet."""
        return {int(ticket) for ticket in {*self.crew.running()} - self.pool.joined if ticket.isdecimal()}

    def lend(self, links: Sequence[Link]) -> None:
        """Let these idle workers be used, and no others."""
        self.pool.take(links)

    def free_when_deserted(self, model: object, free: Callable[[], None]) -> Callable[[], object]:
        """Free the workers of a model once nobody refers to it any more, when workers are needed.

        Args:
            model: What goes; ``free`` must not refer to it.
            free: Gives its workers back.

        Returns:
            Undoes this.
        """
        noticed = weakref.finalize(model, self._deserted.append, free)
        noticed.atexit = False
        self._resting = [*(each for each in self._resting if each.alive), noticed]
        return noticed.detach

    def _free_deserted(self, num_workers: int) -> None:
        if self._num_missing(num_workers) > 0 and any(each.alive for each in self._resting):
            gc.collect()  # models and Trainers refer to each other
        while self._deserted:
            self._deserted.pop()()

    def take_back(self, links: Sequence[Link]) -> None:
        """Have these workers idle again; what they hold is of no use any more."""
        for link in links:
            drop(link)
        self.release(links)

    def release(self, links: Sequence[Link]) -> None:
        """Have these workers idle again, but for those whose process is of no use any more."""
        for link in links:
            if link.is_unfit and not link.gone:
                log.warning("%s can use its device no more after its error; another process takes its place", link)
                if link.order < 0:
                    self.fence(link)
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
            self.crew.kill(link.ticket)

    def rendezvous(self) -> Rendezvous:
        """Return what workers need to find everybody."""
        others = [DriverAddress.of_rank(self.store, rank) for rank in range(1, self.num_drivers)]
        self._take_back()  # all are here
        addresses = tuple((other.host, other.port) for other in others)
        port = self.store.port if self.pool.store is not None else 0
        return Rendezvous(self.pool.address[0], self._met.store_host, port, addresses)

    def dismiss(self, results: Mapping[str, Any]) -> None:
        """Let the launcher's worker ranks return from their Trainer call with the driver's ``results``."""
        if self._launched and self.rank == 0:
            for link in self.pool.links:
                link.tell(Release(cloudpickle.dumps(results)))

    def close(self) -> None:
        """End all workers, and wait for the other drivers that were started here."""
        self._take_back()
        self._drivers.wait()
        self.pool.close()
        self.crew.stop()

    def _take_back(self) -> None:
        """Remove the secret that was left for the other ranks."""
        if self._met.left is not None:
            self._met.left.unlink(missing_ok=True)

    def _num_missing(self, num_workers: int) -> int:
        """How many of ``num_workers`` are neither here and idle nor on their way."""
        return num_workers - self.pool.num_idle - self.crew.num_starting(self.pool.joined)


class WorkerJob:
    """The part of a launcher's rank that is not a driver: it serves while its driver trains."""

    def __init__(self, launcher: Launcher, network: NetworkConfig) -> None:
        first = DriverAddress.of_rank(launcher.store(), 0)
        channel = connect(first.host, first.port, bytes.fromhex(secret_of(first, network)))
        to_driver(channel).send(Hello(own_versions(), os.getpid(), launcher.rank, place=own_place(launcher.device)))
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
        rank = launcher.rank if launcher is not None else 0
        meeting = meeting_of(network, num_drivers, launcher)
        job = DriverJob(meeting, network, num_drivers, rank, launched=launcher is not None)
        job.open()
        _register(key, job)
    found = _registry[key]
    assert isinstance(found, DriverJob)
    return found


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
