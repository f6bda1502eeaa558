"""The control channel: messages arrive whole, and only those who know the secret are heard."""

import contextlib
import hmac
import itertools
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.engine import channel, handshake
from skippipe_plugin.engine.channel import Channel, ChannelClosed, ChannelError, Message, connect
from skippipe_plugin.engine.handshake import PROTOCOL_VERSION, SessionKeys
from skippipe_plugin.engine.listener import Listener
from skippipe_plugin.engine.sealed import Sealer

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
        assert (message.fields["n"], bytes(message.blobs[0])) == (n, blob)
    sender.join()


def test_what_a_thread_has_received_is_given_back(ends: tuple[Channel, Channel]) -> None:
    (ours, theirs), blobs = ends, [bytes(12 << 20)] * 2
    with ThreadPoolExecutor(1) as reader:

        def receive() -> None:
            message = reader.submit(theirs.receive)
            ours.send("weights", blobs=blobs)
            assert [*map(len, message.result().blobs)] == [*map(len, blobs)]

        receive()
        before = psutil.Process().memory_info().rss
        for _ in range(3):  # the C library learns from what is freed to keep more
            receive()
        assert psutil.Process().memory_info().rss < before + (8 << 20)


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


def test_another_version_says_which(listener: Listener) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        thread = threading.Thread(target=lambda: _greet_as_version_9(other))
        thread.start()
        theirs, ours = PROTOCOL_VERSION + 1, PROTOCOL_VERSION
        with pytest.raises(ChannelError, match=f"speaks protocol {theirs}, this one {ours}: install one version"):
            connect("127.0.0.1", other.getsockname()[1], SECRET)
        thread.join()


def _greet_as_version_9(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(handshake._GREETING.pack(b"SKPP", PROTOCOL_VERSION + 1, bytes(32)))


def test_messages_over_the_limit_are_refused_before_they_are_read() -> None:
    for sizes in [(0, (64 << 20) + 1, 0), ((1 << 20) + 1, 2, 0), (1, 2, (1 << 40) + 1)]:
        with pytest.raises(ChannelError, match="over the limit"):
            received(sealed(HEAD.pack(b"SKPP", PROTOCOL_VERSION, *sizes)))


@pytest.mark.parametrize("sizes", [(0, 64 << 20, 0), (1 << 20, 2, 0), (1, 2, 1 << 40)])
def test_no_memory_is_taken_for_a_length_that_is_not_proved(sizes: tuple[int, int, int]) -> None:
    """The other end stays, and sends no more: what would wait for it would wait for ever."""
    here, there = socket.socketpair()
    with here, there:
        ours = Channel(TcpLike(here), SessionKeys(sending=b"s", receiving=b"r"))  # type: ignore[arg-type]
        there.sendall(HEAD.pack(b"SKPP", PROTOCOL_VERSION, *sizes) + bytes(16))
        tracemalloc.start()
        try:
            with pytest.raises(ChannelError, match="altered on its way"):
                ours.receive()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_only_what_is_proved_is_a_sign_of_life() -> None:
    here, there = socket.socketpair()
    with here, there:
        ours = Channel(TcpLike(here), SessionKeys(sending=b"s", receiving=b"r"))  # type: ignore[arg-type]
        data = sealed(
            HEAD.pack(b"SKPP", PROTOCOL_VERSION, 1, 14, BIG) + SIZE.pack(BIG) + b'{"kind":"get"}' + bytes(BIG)
        )
        reader = threading.Thread(target=ours.receive)
        reader.start()
        heard = ours.heard_s
        for byte in data[:37]:  # all of the head and of its proof but one byte
            there.sendall(bytes([byte]))
            time.sleep(0.001)
        assert ours.heard_s == heard
        there.sendall(data[37:38])
        assert (heard := changed(ours, heard)) is not None
        there.sendall(data[38 : 38 + PIECE])
        time.sleep(0.05)
        assert ours.heard_s == heard
        there.sendall(data[38 + PIECE : 38 + PIECE + 16])
        assert changed(ours, heard) is not None
        there.sendall(data[38 + PIECE + 16 :])
        reader.join(5)
        assert not reader.is_alive()


def changed(ours: Channel, heard: float) -> float | None:
    deadline = time.monotonic() + 5
    while ours.heard_s == heard and time.monotonic() < deadline:
        time.sleep(0.001)
    return ours.heard_s if ours.heard_s != heard else None


HEAD, SIZE = struct.Struct("!4sHIIQ"), struct.Struct("!Q")
PIECE = 256 << 10
BIG = 3 * PIECE
MESSAGE = b"".join(
    [
        HEAD.pack(b"SKPP", PROTOCOL_VERSION, 1, 14, 3),
        SIZE.pack(3),
        b'{"kind":"get"}',
        b"abc",
    ]
)


def received(data: bytes) -> Message:
    """What a channel makes of ``data``, after which the other end leaves."""
    here, there = socket.socketpair()

    def send() -> None:
        with contextlib.suppress(OSError):  # it need not be read to its end
            there.sendall(data)
            there.shutdown(socket.SHUT_WR)

    with here, there:
        sender = threading.Thread(target=send, daemon=True)  # a socket pair holds less than large messages
        sender.start()
        try:
            return Channel(TcpLike(here), SessionKeys(sending=b"s", receiving=b"r")).receive()  # type: ignore[arg-type]
        finally:
            here.shutdown(socket.SHUT_RDWR)
            sender.join()


class TcpLike:
    """One end of a socket pair, which knows no options of TCP."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def setsockopt(self, *_: object) -> None:
        """Ignore it."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


def sealed(data: bytes, number: int = 0) -> bytes:
    """Put a proof behind the head, behind every 256 KiB of the body, and behind its end."""
    ends = [HEAD.size, *range(HEAD.size + PIECE, len(data), PIECE), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise([0, *ends]) if end > start]
    out, end = b"", 0
    for piece in pieces:
        end += len(piece)
        out += piece + hmac.digest(b"r", number.to_bytes(8, "big") + data[:end], "sha256")[:16]
    return out


def test_a_message_is_as_documented() -> None:
    message = received(sealed(MESSAGE))
    assert (message.kind, bytes(message.blobs[0])) == ("get", b"abc")


@given(st.integers(0, len(sealed(MESSAGE)) - 1), st.integers(1, 255))
def test_a_message_with_any_byte_altered_is_refused(position: int, change: int) -> None:
    data = bytearray(sealed(MESSAGE))
    data[position] ^= change
    with pytest.raises(ChannelError):
        received(bytes(data))


@given(st.integers(0, len(sealed(MESSAGE)) - 1))
def test_a_message_that_breaks_off_is_refused(length: int) -> None:
    with pytest.raises(ChannelClosed):
        received(sealed(MESSAGE)[:length])


def test_a_message_that_is_played_back_is_refused() -> None:
    with pytest.raises(ChannelError, match="altered on its way"):
        received(sealed(MESSAGE, number=1))


@pytest.mark.parametrize("numbers", [(0, 0), (0, 2), (0, 1, 1), (0, 1, 0), (0, 1, 2, 2)])
def test_a_message_that_comes_again_or_out_of_order_is_refused(numbers: tuple[int, ...]) -> None:
    here, there = socket.socketpair()
    with here, there:
        ours = Channel(TcpLike(here), SessionKeys(sending=b"s", receiving=b"r"))  # type: ignore[arg-type]
        there.sendall(b"".join(sealed(MESSAGE, number) for number in numbers))
        for _ in numbers[:-1]:
            assert ours.receive().kind == "get"
        with pytest.raises(ChannelError, match="altered on its way"):
            ours.receive()


def test_messages_that_are_sent_carry_their_numbers() -> None:
    here, there = socket.socketpair()
    with here, there:
        ours = Channel(TcpLike(here), SessionKeys(sending=b"r", receiving=b"s"))  # type: ignore[arg-type]
        for number in range(3):
            ours.send("get", {}, [b"abc"])
            assert there.recv(1000, socket.MSG_WAITALL | socket.MSG_DONTWAIT) == sealed(MESSAGE, number)
        assert ours.send_if_free("get")
        head = HEAD.pack(b"SKPP", PROTOCOL_VERSION, 0, 14, 0) + b'{"kind":"get"}'
        assert there.recv(1000) == sealed(head, 3)


@pytest.mark.parametrize("size", [0, 1, PIECE - 22, PIECE - 23, PIECE, PIECE + 1, 2 * PIECE - 22, 700_000])
def test_a_message_of_any_size_is_as_documented(size: int) -> None:
    blobs = [os.urandom(size), os.urandom(7), b""]
    data = HEAD.pack(b"SKPP", PROTOCOL_VERSION, 3, 14, size + 7) + b"".join(SIZE.pack(len(blob)) for blob in blobs)
    data += b'{"kind":"get"}' + b"".join(blobs)
    assert [bytes(blob) for blob in received(sealed(data)).blobs] == blobs
    sealer = Sealer(b"r")
    assert b"".join(
        b"".join(piece) for piece in sealer.seal(b'{"kind":"get"}', list(map(memoryview, blobs)))
    ) == sealed(data)


@given(st.binary(max_size=200))
def test_noise_is_no_message(noise: bytes) -> None:
    with pytest.raises(ChannelError):
        received(noise)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b'{"kind": 7}', b"[" * 100_000, b"\xff"], ids=lambda text: repr(text[:9])
)
def test_a_message_of_another_form_is_refused_though_it_is_authentic(text: bytes) -> None:
    with pytest.raises(ChannelError, match="a control message is"):
        received(sealed(HEAD.pack(b"SKPP", PROTOCOL_VERSION, 0, len(text), 0) + text))


def test_nothing_is_unpickled_before_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_parse", lambda *_: pytest.fail("parsed"))
    with pytest.raises(ChannelError, match="altered on its way"):
        received(sealed(MESSAGE)[:-16] + bytes(16))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ChannelError, match=f"cannot join the driver at 127.0.0.1:{port}"):
        connect("127.0.0.1", port, SECRET, timeout_s=1)


def test_messages_that_wait_for_the_next_one_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    driver, worker = ends

    @given(st.lists(st.tuples(st.booleans(), st.sampled_from([0, 3, 20 << 10])), min_size=1, max_size=12))
    @settings(max_examples=50, deadline=None, derandomize=True)
    def check(told: list[tuple[bool, int]]) -> None:
        numbers = []
        for index, (more, size) in enumerate([*told, (False, 0)]):
            blob = bytearray(os.urandom(size))
            numbers.append(driver.send("n", {"index": index}, [blob], more=more))
            blob[:] = bytes(size)  # it was the sender's own, and is no longer needed
        came = [worker.receive() for _ in numbers]
        assert [message.number for message in came] == numbers
        assert [message.fields["index"] for message in came] == list(range(len(numbers)))

    check()


@pytest.mark.parametrize("last", ["send", "send_if_free", "hang_up"])
def test_what_waits_goes_out_with_whatever_comes_next(ends: tuple[Channel, Channel], last: str) -> None:
    driver, worker = ends
    blob = bytearray(b"as it was")
    driver.send("first", {}, [blob], more=True)
    blob[:] = b"changed.."
    worker._connection.settimeout(0.2)
    with pytest.raises(ChannelClosed, match="timed out"):
        worker.receive()
    worker._connection.settimeout(5)
    getattr(driver, last)("second", {})
    first = worker.receive()
    assert (first.kind, bytes(first.blobs[0])) == ("first", b"as it was")
    assert worker.receive().kind == "second"
