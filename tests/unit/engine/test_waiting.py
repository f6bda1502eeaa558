"""What a rank says of its waiting, and when nothing is on its way."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from skippipe_plugin.engine import waiting
from skippipe_plugin.engine.waiting import Waiting, nothing_is_under_way

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")


def test_each_time_is_another_turn() -> None:
    found = Waiting()
    assert found.turn == 0
    for turn in (1, 2, 3):
        with found:
            assert found.turn == turn
        assert found.turn == 0


def test_other_threads_do_not_count() -> None:
    found = Waiting()

    def wait() -> None:
        with found:
            seen.append(found.turn)

    seen: list[int] = []
    with found:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        assert (seen, found.turn) == ([1], 1)
    with found:
        assert found.turn == 2


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one connection, the only one that is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as one:
        one.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            copies = [(each.fileno(), each) for each in (server, one, other)]
            monkeypatch.setattr(waiting, "sockets_among", lambda _: iter(copies))
            yield one, other


def becomes(expected: bool) -> bool:
    deadline = time.monotonic() + 5.0
    while nothing_is_under_way() is not expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return nothing_is_under_way() is expected


@LINUX
def test_what_nobody_has_read_is_under_way(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    assert nothing_is_under_way()
    one.sendall(b"word")
    assert becomes(False)
    other.recv(4)
    assert becomes(True)


@LINUX
def test_what_nobody_takes_is_under_way(pair: tuple[socket.socket, socket.socket]) -> None:
    one, _ = pair
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(bytes(1 << 16))
    assert not nothing_is_under_way()


def test_who_has_no_connections_knows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "sockets_among", lambda _: iter(()))
    assert not nothing_is_under_way()
