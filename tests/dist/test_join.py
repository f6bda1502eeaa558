"""Who may join a driver: workers of the same job and version, and nobody else."""

import socket
import time

import pytest

from skippipe_plugin.driver.pool import WorkerPool
from skippipe_plugin.engine.channel import connect
from skippipe_plugin.engine.versions import mismatch, own_versions

HOST = "127.0.0.1"


@pytest.fixture
def pool():
    pool = WorkerPool(HOST)
    yield pool
    pool.close()


def join(pool: WorkerPool, versions: dict[str, str]):
    channel = connect(*pool.address, bytes.fromhex(pool.secret))
    channel.send("hello", {"pid": 1, "versions": versions})
    return channel


def wait_for_idle(pool: WorkerPool, count: int) -> None:
    deadline = time.monotonic() + 10
    while pool.num_idle < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_workers_join_whenever_they_come(pool: WorkerPool) -> None:
    channels = [join(pool, own_versions()) for _ in range(3)]
    wait_for_idle(pool, 3)
    assert len(pool.acquire(2)) == 2
    assert pool.num_idle == 1
    for channel in channels:
        channel.close()


def test_another_version_is_told_why_it_is_refused(pool: WorkerPool) -> None:
    other = own_versions() | {"torch": "1.0"}
    refusal = join(pool, other).receive()
    assert refusal.kind == "refuse"
    assert refusal.fields["reason"] == f"it has torch 1.0, and the driver has {own_versions()['torch']}"
    assert pool.num_idle == 0


def test_versions_are_compared_by_name() -> None:
    assert mismatch(own_versions()) == ""
    assert "torch of unknown version" in mismatch({})


def test_strangers_do_not_keep_workers_out(pool: WorkerPool) -> None:
    """One sends nonsense, one says nothing: both are dropped, and a worker gets in."""
    silent = socket.create_connection(pool.address)
    noisy = socket.create_connection(pool.address)
    noisy.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 100)
    channel = join(pool, own_versions())
    wait_for_idle(pool, 1)
    for connection in (silent, noisy, channel):
        connection.close()


def test_a_wrong_secret_is_refused(pool: WorkerPool) -> None:
    with pytest.raises(Exception, match=r"secret|closed"):
        connect(*pool.address, b"x" * 32)
    assert pool.num_idle == 0
