"""Strangers at the driver's door: refused with a line in the log, and nobody else is kept waiting."""

import contextlib
import logging
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skippipe_plugin.engine import listener as module
from skippipe_plugin.engine.c10d import host_store
from skippipe_plugin.engine.channel import ChannelError, connect
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.handshake import MAGIC, PROTOCOL_VERSION
from skippipe_plugin.engine.listener import Listener, Refusals
from skippipe_plugin.job.network import NetworkConfig

SECRET = b"the job's secret"
HOST = "127.0.0.1"
GREETING = struct.pack("!4sH32s", MAGIC, PROTOCOL_VERSION, bytes(32))
TLS_HELLO = bytes.fromhex("16030100c8010000c40303") + os.urandom(193)


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener(HOST, 0, SECRET, handshake_s=1.0)
    yield listener
    listener.close()


@pytest.fixture
def refusals(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger=module.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


def visit(listener: Listener) -> socket.socket:
    return socket.create_connection((listener.host, listener.port))


def address(stranger: socket.socket) -> str:
    host, port = stranger.getsockname()
    return f"{host}:{port}"


def said_goodbye(stranger: socket.socket) -> bool:
    """Wait for the other end to close."""
    stranger.settimeout(10)
    with contextlib.suppress(ConnectionResetError):  # it left something unread
        while stranger.recv(4096):
            pass
    return True


def worker_comes_in(listener: Listener) -> bool:
    """Whether one who knows the secret gets in."""
    channel = connect(listener.host, listener.port, SECRET, timeout_s=10)
    channel.send("hello", {"pid": 7})
    arrived = listener.accept(timeout_s=10)
    channel.close()
    if arrived is None:
        return False
    arrived[0].close()
    return arrived[1].kind == "hello"


def wait_for(lines: Callable[[], list[str]], count: int) -> list[str]:
    deadline = time.monotonic() + 10
    while len(lines()) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return lines()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "it is not a skippipe process but speaks HTTP"),
        (TLS_HELLO, "it is not a skippipe process but speaks TLS"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "it is not a skippipe process but speaks SSH"),
        (b"\0" * 10_000_000, "it is not a skippipe process"),
        (
            struct.pack("!4sH32s", MAGIC, PROTOCOL_VERSION + 1, bytes(32)),
            f"it speaks protocol {PROTOCOL_VERSION + 1}, this one {PROTOCOL_VERSION}: install one",
        ),
        (GREETING + bytes(32), "it does not know this job's secret"),
        (b"", "it did not prove in time that it knows this job's secret"),
        (GREETING, "it did not prove in time that it knows this job's secret"),
    ],
    ids=["http", "tls", "ssh", "oversized", "other version", "wrong secret", "silent", "half"],
)
def test_strangers_are_refused_with_one_line(listener: Listener, refusals, sent: bytes, reason: str) -> None:
    with visit(listener) as stranger:
        with contextlib.suppress(OSError):  # it is not obliged to read all of that
            stranger.sendall(sent)
        assert worker_comes_in(listener)
        assert said_goodbye(stranger)
        lines = wait_for(refusals, 1)
        assert len(lines) == 1
        assert lines[0].startswith(f"refused a connection from {address(stranger)}: {reason}")


def test_who_connects_and_leaves_is_named(listener: Listener, refusals) -> None:
    with visit(listener) as stranger:
        name = address(stranger)
    assert wait_for(refusals, 1) == [
        f"refused a connection from {name}: it left before it had proved that it knows this job's secret"
    ]


def test_a_wrong_secret_is_named_on_both_ends_and_shown_on_neither(listener: Listener, refusals) -> None:
    with pytest.raises(ChannelError, match=r"cannot join the driver at .*: it knows another secret") as failure:
        connect(listener.host, listener.port, b"a guess")
    (line,) = wait_for(refusals, 1)
    assert "it does not know this job's secret" in line
    for secret in (SECRET, b"a guess"):
        assert secret.decode() not in line + repr(failure.value)
        assert secret.hex() not in line + repr(failure.value)


def trickle(stranger: socket.socket) -> None:
    for byte in GREETING + bytes(1000):
        stranger.sendall(bytes([byte]))
        time.sleep(0.05)


def test_one_byte_at_a_time_takes_no_longer(listener: Listener, refusals) -> None:
    with visit(listener) as stranger, pytest.raises(OSError, match=r"reset|[Bb]roken"):
        trickle(stranger)
    assert "it did not prove in time" in wait_for(refusals, 1)[0]
    assert worker_comes_in(listener)


def test_silent_ones_have_bounded_room_and_keep_nobody_out(refusals) -> None:
    listener = Listener(HOST, 0, SECRET, handshake_s=60, max_visitors=8)
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(visit(listener)) for _ in range(50)]
        assert worker_comes_in(listener)
        assert all(said_goodbye(stranger) for stranger in strangers[:40])
        deadline = time.monotonic() + 10
        while threading.active_count() > threads + 8 and time.monotonic() < deadline:
            time.sleep(0.01)  # those that were sent away have to run once more to notice
        assert threading.active_count() <= threads + 8
        listener.close()
    assert refusals()[0].endswith("too many others came before it had proved that it knows the secret")
    assert sum(1 + int(re.findall(r"and (\d+) more", line + "and 0 more")[0]) for line in refusals()) >= 50


def test_a_scan_fills_no_log(listener: Listener, refusals) -> None:
    for _ in range(300):
        visit(listener).close()
    assert worker_comes_in(listener)
    listener.close()
    lines = [line for line in refusals() if "it left before" in line]
    assert len(lines) <= 2


def test_reasons_are_said_again_after_a_while_with_their_number(refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    book = Refusals()
    for port in range(5):
        book.note(f"10.0.0.1:{port}", "reason")
    now[0] = 61
    book.note("10.0.0.1:9", "reason")
    book.note("10.0.0.2:9", "reason")
    assert refusals() == [
        "refused a connection from 10.0.0.1:0: reason",
        "refused a connection from 10.0.0.1:9: reason (and 4 more like it)",
        "refused a connection from 10.0.0.2:9: reason",
    ]
    for host in range(1000):
        book.note(f"10.1.0.{host}:1", "reason")
    assert len(refusals()) == 31  # 30 in a minute, from as many hosts as there may be
    for minute in range(2, 20):
        now[0] = 61 * minute
        for host in range(30):
            book.note(f"10.2.{minute}.{host}:1", "reason")
    assert len(book._said) == module._MAX_REASONS


def test_what_strangers_choose_makes_no_other_line(refusals) -> None:
    book = Refusals()
    for number in range(100):
        book.note(f"10.0.0.1:{number}", f"it speaks protocol {number}, this one 3: install one version")
        book.note(f"[2001:db8::{number:x}]:{number}", "it speaks SSH")
    assert len(refusals()) == 2
    book.note("[::ffff:10.0.0.7]:1", "it speaks SSH")
    book.note("[::ffff:10.0.0.8]:1", "it speaks SSH")
    assert len(refusals()) == 4


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "0", "0.0", "0x0", "000.0.0.0", "::", "::0", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0", "::ffff:0:0", ""],
)
def test_all_addresses_are_listened_on_for_no_spelling(host: str) -> None:
    with pytest.raises(SkipPipeError, match="means every address of this machine"):
        Listener(host, 0, SECRET)
    with pytest.raises(SkipPipeError, match="means every address of this machine"):
        host_store(host)
    with pytest.raises(ValueError, match="means every address of this machine"):
        NetworkConfig(host=host)


def test_a_name_of_all_addresses_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]
    known = {"everywhere": resolved}
    real = socket.getaddrinfo

    def resolve(host: str | None, port: int, **options: int):
        if host in known and options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        return known[host] if host in known else real(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(SkipPipeError, match="'everywhere' means every address"):
        Listener("everywhere", 0, SECRET)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=80), max_size=4), st.booleans())
def test_no_noise_gets_in(listener: Listener, parts: list[bytes], starts_right: bool) -> None:
    with visit(listener) as stranger, contextlib.suppress(OSError):
        for part in ([GREETING] if starts_right else []) + parts:
            stranger.sendall(part)
        stranger.shutdown(socket.SHUT_WR)
        assert said_goodbye(stranger)
    assert listener.accept(timeout_s=0) is None


def test_it_listens_where_it_was_told_to_and_nowhere_else(listener: Listener) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", listener.port))
    with pytest.raises(SkipPipeError, match=r"cannot listen on 192.0.2.1:0 .*must be an address of this machine"):
        Listener("192.0.2.1", 0, SECRET)


@pytest.mark.parametrize("host", ["\x80", "a\0b", "." * 300])
def test_what_can_be_no_name_is_an_error_of_ours(host: str) -> None:
    with pytest.raises(SkipPipeError, match="must be an address of this machine"):
        Listener(host, 0, SECRET)


def test_a_port_in_use_names_the_way_out(listener: Listener) -> None:
    with pytest.raises(SkipPipeError, match=f"cannot listen on 127.0.0.1:{listener.port}.*0 for any free one"):
        Listener(HOST, listener.port, SECRET)
