"""How the processes of a run meet: which meeting is chosen, what is refused before anything is open, what is said."""

import json
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.engine.c10d import host_store
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE
from skippipe_plugin.job import meetings
from skippipe_plugin.job.job import DriverJob
from skippipe_plugin.job.launcher import Launcher
from skippipe_plugin.job.meetings import ByHand, DriverAddress, Launched, Supervised, driver_key, meeting_of
from skippipe_plugin.job.network import NetworkConfig

RANK_0 = Launcher(0, "127.0.0.1", 29500, hosts_store=False)
SECRET = "5a" * 32


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SKIPPIPE_SUPERVISOR", SECRET_VARIABLE, SECRET_FILE_VARIABLE, "SKIPPIPE_WORKERS"):
        monkeypatch.delenv(name, raising=False)


def test_how_a_process_was_started_says_how_it_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meeting_of(NetworkConfig(), 2, None) == ByHand(NetworkConfig(), "local", 2)
    assert meeting_of(NetworkConfig(), 1, RANK_0) == Launched(NetworkConfig(), RANK_0)
    monkeypatch.setenv("SKIPPIPE_SUPERVISOR", "127.0.0.1:1")
    assert meeting_of(NetworkConfig(), 1, None) == Supervised(NetworkConfig(), "local")
    with pytest.raises(SkipPipeError, match="drivers=2: start it without skippipe run"):
        meeting_of(NetworkConfig(), 2, None)
    with pytest.raises(SkipPipeError, match="another launcher"):
        meeting_of(NetworkConfig(), 1, RANK_0)
    with pytest.raises(ValueError, match=f"set {SECRET_FILE_VARIABLE} instead"):
        meeting_of(NetworkConfig(secret_file="secret"), 1, None)


@pytest.mark.parametrize("network", [NetworkConfig(local_workers=1), NetworkConfig(workers="kubernetes")])
def test_who_joins_by_hand_must_be_able_to_know_the_secret(
    network: NetworkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a pool was opened")

    monkeypatch.setattr(meetings, "WorkerPool", opened)
    monkeypatch.setattr(meetings, "SupervisedProcesses", opened)
    for meeting in (ByHand(network, network.workers or "local", 1), Supervised(network, network.workers or "local")):
        with pytest.raises(ValueError, match="who must know a secret"):
            meeting.open()


def test_a_driver_alone_needs_no_store_and_tells_how_to_join_only_with_a_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for secret, said in ((None, 0), (SECRET, 1)):
        if secret is not None:
            monkeypatch.setenv(SECRET_VARIABLE, secret)
        job = DriverJob(ByHand(NetworkConfig(), "local", 1), NetworkConfig())
        job.open()
        try:
            assert job.pool.store is None
            assert job.rendezvous().store_port == 0
            assert len(caplog.messages) == said
        finally:
            job.close()
    host, port = job.pool.address
    assert f"skippipe worker --join {host}:{port} (which takes {SECRET_VARIABLE}" in caplog.text
    assert SECRET not in caplog.text


def test_drivers_find_each_other_in_the_store() -> None:
    job = DriverJob(ByHand(NetworkConfig(), "local", 2), NetworkConfig(), 2)
    job.open()
    try:
        assert DriverAddress.of_rank(job.store, 0).port == job.pool.address[1]
        job.store.set(driver_key(1), DriverAddress("10.0.0.2", 7, "ab").text)
        assert job.rendezvous().other_drivers == (("10.0.0.2", 7),)
    finally:
        job.close()


def test_what_was_opened_is_closed_when_the_rest_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise SkipPipeError("nobody can be told")

    job = DriverJob(ByHand(NetworkConfig(), "local", 2), NetworkConfig(), 2)
    monkeypatch.setattr(DriverAddress, "text", property(fail))
    with pytest.raises(SkipPipeError, match="nobody can be told"):
        job.open()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(job.pool.address, timeout=1)


@settings(max_examples=30)
@given(st.text(max_size=20), st.integers(0, 65535), st.text(max_size=20))
def test_an_address_comes_back_from_its_text(host: str, port: int, mark: str) -> None:
    assert DriverAddress.parse(DriverAddress(host, port, mark).text) == DriverAddress(host, port, mark)


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_what_is_no_address_is_an_error_that_shows_it(text: bytes) -> None:
    with pytest.raises(SkipPipeError, match="no address of a driver"):
        DriverAddress.parse(text)


def test_an_address_that_lacks_something_is_none() -> None:
    store = host_store("127.0.0.1")
    store.set(driver_key(0), '{"host": "127.0.0.1", "port": "http", "fingerprint": ""}')
    with pytest.raises(SkipPipeError, match="http"):
        DriverAddress.of_rank(store, 0)
