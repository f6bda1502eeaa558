"""The control channel: messages arrive whole, and only those who know the secret are heard."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.engine import channel
from skippipe_plugin.engine.channel import Channel, ChannelClosed, ChannelError, Listener, Message, connect
from skippipe_plugin.engine.errors import SkipPipeError

SECRET = b"the job's secret"


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener("127.0.0.1", 0, SECRET)
    yield listener
    listener.close()


@pytest.fixture
def ends(listener: Listener) -> Iterator[tuple[Channel, Channel]]:
    accepted: list[tuple[Channel, Message] | None] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(timeout_s=5)))
    thread.start()
    worker = connect(listener.host, listener.port, SECRET)
    worker.send("hello", {"pid": 7})
    thread.join()
    (arrived,) = accepted
    assert arrived is not None
    driver, greeting = arrived
    assert (greeting.kind, greeting.fields) == ("hello", {"pid": 7})
    yield driver, worker
    driver.close()
    worker.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    driver, worker = ends
    blob = bytearray(os.urandom(1 << 20))

    @given(
        st.text(), st.dictionaries(st.text(), st.integers() | st.text() | st.none()), st.lists(st.binary(max_size=50))
    )
    @settings(max_examples=50, deadline=None, derandomize=True)
    def check(kind: str, fields: dict, blobs: list[bytes]) -> None:
        fields.pop("kind", None)
        driver.send(kind, fields, blobs)
        message = worker.receive()
        assert (message.kind, message.fields, [bytes(part) for part in message.blobs]) == (kind, fields, blobs)

    check()
    sender = threading.Thread(target=lambda: [driver.send("big", {"n": n}, [blob]) for n in range(8)])
    sender.start()
    for n in range(8):
        message = worker.receive()
        assert (message.fields["n"], message.blobs[0]) == (n, blob)
    sender.join()


def test_the_round_trip_is_known_after_a_message_and_unknown_at_the_end(ends: tuple[Channel, Channel]) -> None:
    driver, worker = ends
    worker.send("hello")
    driver.receive()
    assert 0 <= driver.round_trip_s < 1
    driver.close()
    assert driver.round_trip_s == 0


def test_the_other_end_leaving_is_noticed(ends: tuple[Channel, Channel]) -> None:
    driver, worker = ends
    driver.close()
    with pytest.raises(ChannelClosed):
        worker.receive()


def test_a_wrong_secret_is_refused_on_both_sides(listener: Listener) -> None:
    refused: list[Channel | None] = []
    thread = threading.Thread(target=lambda: refused.append(listener.accept(timeout_s=5)))
    thread.start()
    with pytest.raises(ChannelError, match=r"cannot join|closed the connection|secret"):
        connect(listener.host, listener.port, b"a guess").receive()
    thread.join()
    assert refused == [None]


@pytest.mark.parametrize(
    "nonsense", [b"GET / HTTP/1.1\r\n\r\n" * 10, b"", os.urandom(500)], ids=["http", "nothing", "noise"]
)
def test_strangers_are_sent_away(listener: Listener, nonsense: bytes) -> None:
    with socket.create_connection((listener.host, listener.port)) as stranger:
        stranger.sendall(nonsense)
        assert listener.accept(timeout_s=5, handshake_s=0.3) is None


def test_another_version_says_which(listener: Listener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: _greet_as_version_9(other))
        thread.start()
        with pytest.raises(ChannelError, match="speaks protocol 9, this one 1: install one version"):
            connect("127.0.0.1", other.getsockname()[1], SECRET)
        thread.join()


def _greet_as_version_9(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(channel._GREETING.pack(b"SKPP", 9, bytes(32)))


def test_messages_over_the_limit_are_refused_before_they_are_read(ends: tuple[Channel, Channel]) -> None:
    driver, worker = ends
    header = channel._HEADER.pack(b"SKPP", channel.PROTOCOL_VERSION, 0, channel.MAX_JSON_BYTES + 1, 0)
    driver._connection.sendall(header)
    with pytest.raises(ChannelError, match="over the limit"):
        worker.receive()


def test_a_port_in_use_names_the_way_out(listener: Listener) -> None:
    with pytest.raises(SkipPipeError, match=f"cannot listen on 127.0.0.1:{listener.port}.*0 for any free one"):
        Listener("127.0.0.1", listener.port, SECRET)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ChannelError, match=f"cannot join the driver at 127.0.0.1:{port}"):
        connect("127.0.0.1", port, SECRET, timeout_s=1)
