"""Who stands by takes over when most workers have lost the first supervisor, and never before. Real stores."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from skippipe_plugin.engine.c10d import TCPStore, host_store
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.job_store import JobState, JobStore, Members
from skippipe_plugin.supervisor import standby

KEY, NAMES = "skippipe/supervised/:0", ("a", "b", "c")
FINGERPRINT = "of the secret"


@dataclass
class Job:
    """The first supervisor's store, which can be lost, and the one of who stands by."""

    host: str = "127.0.0.1"
    stores: list[TCPStore] = field(default_factory=list)

    def begin(self, names: tuple[str, ...] = NAMES) -> JobStore:
        self.stores.append(host_store(self.host))
        store = JobStore(self.stores[-1], self.host)
        store.begin(FINGERPRINT)
        store.put(JobState(attempt=2, members={KEY: Members(1, names)} if names else {}))
        return store


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Callable[[JobStore], None]:
    """Lets a store be gone, as far as who stands by can see."""
    gone = set[Any]()
    reach, state = JobStore.reach, JobStore.state

    def reached(host: str, port: int) -> JobStore:
        if (host, port) in gone:
            raise TimeoutError("timed out")
        return reach(host, port)

    def known(self: JobStore) -> JobState:
        if self.address in gone:
            raise RuntimeError("Connection reset by peer")
        return state(self)

    monkeypatch.setattr(JobStore, "reach", reached)
    monkeypatch.setattr(JobStore, "state", known)
    monkeypatch.setattr(standby, "_LOOK_S", 0.02)
    monkeypatch.setattr(standby, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(standby, "_UNKNOWN_S", 1.0)
    return lambda store: gone.add(store.address)


def waiting(first: JobStore, own: JobStore) -> tuple[threading.Thread, list[Any]]:
    """Stand by in a thread; return it and where its end will be."""
    found: list[Any] = []

    def wait() -> None:
        try:
            found.append(standby.await_loss(first.address, own, FINGERPRINT))
        except SkipPipeError as error:
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + 10
    while not first.standbys():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return thread, found


def end_of(thread: threading.Thread, found: list[Any]) -> Any:
    thread.join(10)
    assert not thread.is_alive()
    return found[0]


def call(store: JobStore, *names: str, knowing: Members | None = None) -> None:
    for name in names:
        store.call(name, KEY, knowing or Members(1, NAMES))


def test_it_takes_over_with_most_workers(lost: Callable[[JobStore], None]) -> None:
    job = Job()
    first, own = job.begin(), job.begin(())
    thread, found = waiting(first, own)
    assert first.standbys() == [own.address]
    lost(first)
    time.sleep(0.2)
    call(own, "a")
    time.sleep(0.2)
    assert not found
    call(own, "a", "c")
    assert end_of(thread, found) == JobState(attempt=3, members={KEY: Members(1, [*NAMES])})


def test_it_hears_of_workers_that_joined_after_it_had_looked(lost: Callable[[JobStore], None]) -> None:
    """At first it knows of nobody, then of one, which is not most of them."""
    job = Job()
    first, own = job.begin(()), job.begin(())
    thread, found = waiting(first, own)
    lost(first)
    time.sleep(0.2)
    call(own, "b", knowing=Members(3, NAMES))
    time.sleep(0.2)
    assert not found
    call(own, "a", knowing=Members(2, NAMES[:1]))
    assert end_of(thread, found) == JobState(attempt=3, members={KEY: Members(3, [*NAMES])})


def test_nothing_is_taken_over_while_most_workers_do_not_call(lost: Callable[[JobStore], None]) -> None:
    """Of three one calls, and one has called before: the first host may well have the others."""
    job = Job()
    first, own = job.begin(), job.begin(())
    call(own, "b")
    thread, found = waiting(first, own)
    lost(first)
    time.sleep(0.2)
    call(own, "a")
    told = r"most of its 3 workers do not come to this host: it is not taken over, because it may go on there"
    with pytest.raises(SkipPipeError, match=told):
        raise end_of(thread, found)


def test_a_job_that_ends_is_over_here_too(lost: Callable[[JobStore], None]) -> None:
    job = Job()
    first, own = job.begin(), job.begin(())
    thread, found = waiting(first, own)
    first.end(7)
    assert end_of(thread, found) == 7
    assert first.num_told() == 1


def test_a_job_of_which_nothing_is_left_elsewhere(lost: Callable[[JobStore], None]) -> None:
    job = Job()
    first, own = job.begin(()), job.begin(())
    thread, found = waiting(first, own)
    lost(first)
    with pytest.raises(SkipPipeError, match="no worker had joined it by hand from another host"):
        raise end_of(thread, found)


def test_who_cannot_stand_by_reads_why_at_once() -> None:
    job = Job()
    first, own = job.begin(), job.begin(())
    with pytest.raises(SkipPipeError, match="has another secret: copy its secret file to this host"):
        standby.await_loss(first.address, own, "of another")
    with pytest.raises(SkipPipeError, match=r"no job is run at 127\.0\.0\.1:1 .*--standby-for takes the address"):
        standby.await_loss(("127.0.0.1", 1), own, FINGERPRINT)
