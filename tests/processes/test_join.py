"""Who may join a driver: workers of the same job and version, and nobody else."""

import functools
import socket
import sys
import threading
import time

import pytest

from skippipe_plugin.cli import main
from skippipe_plugin.driver.pool import WorkerPool
from skippipe_plugin.engine.channel import connect
from skippipe_plugin.engine.control.line import to_driver
from skippipe_plugin.engine.control.presence import Hello, Refuse
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.versions import mismatch, own_versions
from skippipe_plugin.worker import Worker
from skippipe_plugin.worker.joining import join as join_by_hand
from skippipe_plugin.worker.joining import parse_address
from tests.processes.support import plain, start

HOST = "127.0.0.1"


@pytest.fixture
def pool():
    pool = WorkerPool(HOST)
    yield pool
    pool.close()


def join(pool: WorkerPool, versions: dict[str, str]):
    channel = connect(*pool.address, bytes.fromhex(pool.secret))
    to_driver(channel).send(Hello(versions, 1))
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
    refusal = to_driver(join(pool, other)).receive().body
    assert isinstance(refusal, Refuse)
    assert refusal.reason == (
        f"it has torch 1.0, and the driver has {own_versions()['torch']}; install the driver's versions"
    )
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
    with pytest.raises(SkipPipeError, match="it knows another secret, or is no driver: give both the same"):
        connect(*pool.address, b"x" * 32)
    assert pool.num_idle == 0


# ------------------------------------------------------------------- by hand


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def refusal(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret: str) -> str:
    """What ``skippipe worker`` says when it is turned away: one line, and an exit status."""
    monkeypatch.setenv("SKIPPIPE_SECRET", secret)
    host, port = pool.address
    assert main(["worker", "--join", f"{host}:{port}", "--wait", "0"]) == 1
    return capsys.readouterr().err


def test_a_worker_that_is_refused_says_why(pool: WorkerPool, monkeypatch, capsys) -> None:
    assert "it knows another secret, or is no driver: give both the same job's" in refusal(
        pool, monkeypatch, capsys, "00" * 32
    )
    monkeypatch.setattr("skippipe_plugin.worker.joining.own_versions", lambda: own_versions() | {"python": "2.7"})
    told = refusal(pool, monkeypatch, capsys, pool.secret)
    assert "does not take this worker: it has python 2.7, and the driver has 3." in told
    assert told.splitlines()[-1].endswith("install the driver's versions")


def test_a_worker_that_was_given_up_is_told_so(pool: WorkerPool) -> None:
    channel = join(pool, own_versions())
    wait_for_idle(pool, 1)
    (link,) = pool.idle()
    for _ in range(3):  # nobody reads the worker's end
        link.beat(patience=1)
    with pytest.raises(SkipPipeError, match="gave no sign of life for too long and was given up; join anew"):
        Worker(channel).serve()


def test_a_driver_that_never_comes_is_waited_for_with_a_bound() -> None:
    started = time.monotonic()
    with pytest.raises(SkipPipeError, match=r"tried for 0\.8 s.*NetworkConfig\(host"):
        join_by_hand(HOST, free_port(), "00" * 32, wait_s=0.8)
    assert time.monotonic() - started < 30


def test_what_is_no_driver_is_left_at_once() -> None:
    with socket.create_server((HOST, 0)) as server:
        answering = threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.6" + b" " * 40))
        answering.start()
        with pytest.raises(SkipPipeError, match="not a skippipe process but speaks SSH"):
            join_by_hand(HOST, server.getsockname()[1], "00" * 32, wait_s=60)
        answering.join()


@pytest.mark.parametrize("text", ["here", "here:", ":1", "here:0", "here:70000", "here:1.5", ""])
def test_addresses_are_checked(text: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SKIPPIPE_SECRET", "00" * 32)
    with pytest.raises(ValueError, match=r"is not HOST:PORT, such as 10\.0\.0\.5:29400"):
        parse_address(text)
    assert main(["worker", "--join", text]) == 2
    assert "is not HOST:PORT" in capsys.readouterr().err


def test_process_ids_of_other_hosts_are_not_taken_for_ours(pool: WorkerPool, monkeypatch) -> None:
    """A worker on another machine may have the number of a process here, which must not be ended in its place."""
    here = join(pool, own_versions())
    elsewhere = functools.partial(socket.create_connection, source_address=("127.0.0.2", 0))
    monkeypatch.setattr("skippipe_plugin.engine.channel.socket.create_connection", elsewhere)
    there = join(pool, own_versions())
    wait_for_idle(pool, 2)
    assert sorted(link.pid or 0 for link in pool.idle()) == [0, 1]
    for channel in (here, there):
        channel.close()


def test_a_run_whose_workers_all_join_by_hand(tmp_path) -> None:
    """The worker is there before the driver, and both know the secret from a file."""
    file, port = tmp_path / "secret", free_port()
    file.write_text("5e" * 32)
    file.chmod(0o600)
    worker = start([sys.executable, "-m", "skippipe_plugin.cli", "worker", "--join", f"{HOST}:{port}"], secret=file)
    driver = start(plain(2, 1, f"port={port}"), secret=file)
    _, told = driver.communicate(timeout=100)
    output, _ = worker.communicate(timeout=20)
    assert (driver.returncode, worker.returncode) == (0, 0), told[-2000:]
    assert f"workers may join this job by hand: skippipe worker --join {HOST}:{port} --secret-file {file}" in told
    assert "needs this worker no more" in output
