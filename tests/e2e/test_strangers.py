"""Strangers at every port of a run: refused, and the run unharmed. The secret is nowhere to be read."""

import contextlib
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.engine.handshake import PROTOCOL_VERSION, ChannelError, authenticate_host
from skippipe_plugin.engine.sealed import Sealer
from skippipe_plugin.job import job

from .models import tokens
from .modules import Configured, loader
from .support import assert_same_run, train

GREETINGS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    bytes.fromhex("16030100c8010000c40303") + bytes(193),
    b"SKPP" + PROTOCOL_VERSION.to_bytes(2, "big") + bytes(64),
    os.urandom(10_000),
    bytes(1_000_000),
)


class Strangers(Callback):
    """Come in the middle of the run, to each port that driver and workers listen on; some stay until the end."""

    def __init__(self) -> None:
        self.ports: set[tuple[str, int]] = set()
        self.guests: list[socket.socket] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        pids = [os.getpid(), *trainer.strategy.worker_pids.values()]
        connections = [link for pid in pids for link in psutil.Process(pid).net_connections("tcp")]
        self.ports |= {tuple(link.laddr) for link in connections if link.status == psutil.CONN_LISTEN}
        for port in self.ports:
            for greeting in GREETINGS:
                self.visit(port, greeting)

    def visit(self, port: tuple[str, int], greeting: bytes) -> None:
        guest = socket.create_connection(port, timeout=5)
        self.guests.append(guest)
        with contextlib.suppress(OSError):
            guest.sendall(greeting)
        if len(self.guests) % 2:
            guest.close()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for guest in self.guests:
            guest.close()


def test_strangers_at_every_port_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    job.stop_workers()  # a job of another test would have a port of its own, and refuse strangers too
    data, strangers = loader(tokens(24)), Strangers()
    expected = train(Configured, data, 1)
    found = train(Configured, data, 3, {"num_microbatches": 4}, callbacks=[strangers])
    assert_same_run(found, expected)
    assert {host for host, _ in strangers.ports} == {"127.0.0.1"}
    assert len(strangers.ports) == 1  # the door: those of the groups, and of the store by which they form, are shut
    lines = [record.getMessage() for record in caplog.records]
    for reason in ("speaks HTTP", "speaks TLS", "does not know this job's secret"):
        assert sum("refused a connection from 127.0.0.1:" in line and reason in line for line in lines) == 1


class Vandals(Strangers):
    """Send malformed messages to each port: noise and recorded ones with bits turned over, before a proof and after.

    Args:
        count: How many to each port.
        seed: Of what they send.
    """

    def __init__(self, count: int, seed: int = 5) -> None:
        super().__init__()
        self.count, self.random = count, random.Random(seed)
        self.sent: Counter[str] = Counter()
        self.before = self.after = (0, 0)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != 2:
            return
        super().on_train_batch_start(trainer, module, batch, batch_idx)
        (entry,) = (each for each in job._registry.values() if isinstance(each, job.DriverJob))
        self.secret, door = bytes.fromhex(entry.pool.secret), entry.pool.address
        self.recorded = self.record(door)
        ways = [self.noise, self.altered, self.altered_once_proved, self.senseless]
        for port in self.ports:
            for way in ways[:2]:  # the first ones take what later ones do not
                self.attack(port, way, 50)
            self.before = self.weight()
            for number in range(self.count):
                self.attack(port, ways[number % (len(ways) if port == door else 2)], 1)
        deadline = time.monotonic() + 30
        while self.weight()[1] > self.before[1] + 8 and time.monotonic() < deadline:
            time.sleep(0.1)  # the last ones are still on their way out
        self.after = self.weight()

    def attack(self, port: tuple[str, int], way: Callable[[socket.socket], None], times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(OSError, ChannelError), socket.create_connection(port, timeout=10) as guest:
                way(guest)
            self.sent[f"{way.__name__} to {port[1]}"] += 1

    def weight(self) -> tuple[float, int]:
        """MB of memory, and open files, of this process."""
        process = psutil.Process()
        return process.memory_info().rss / 2**20, process.num_fds()

    def record(self, door: tuple[str, int]) -> bytes:
        """Return what a worker says when it joins."""
        said = bytearray()
        with socket.create_connection(door, timeout=10) as guest:
            send, guest_sends = guest.sendall, said.extend
            recorder = SimpleNamespace(
                recv=guest.recv,
                recv_into=guest.recv_into,
                settimeout=guest.settimeout,
                sendall=lambda data: (guest_sends(data), send(data)),
            )
            authenticate_host(recorder, self.secret, 10.0)
        return bytes(said)

    def flipped(self, data: bytes) -> bytes:
        altered = bytearray(data)
        for _ in range(self.random.randint(1, 3)):
            altered[self.random.randrange(len(altered))] ^= 1 << self.random.randrange(8)
        return bytes(altered)

    def noise(self, guest: socket.socket) -> None:
        guest.sendall(self.random.randbytes(self.random.choice((1, 8, 64, 500))))

    def altered(self, guest: socket.socket) -> None:
        guest.sendall(self.flipped(self.recorded))

    def altered_once_proved(self, guest: socket.socket) -> None:
        sealer = Sealer(authenticate_host(guest, self.secret, 10.0).sending)
        for piece in sealer.seal(b'{"kind":"Hello","pid":1}'):
            guest.sendall(self.flipped(b"".join(piece)))

    def senseless(self, guest: socket.socket) -> None:
        """Whole, proved messages that say nothing a driver understands."""
        sealer = Sealer(authenticate_host(guest, self.secret, 10.0).sending)
        texts = [b"", b"[]", b'{"kind":"Hello"}', b'{"kind":"Done","step":1}', b'{"kind":7}', b"{" * 500]
        texts += [b'{"kind":"Hello","values":[[1],"x"]}', b'{"kind":"Hello","values":[{},null,1e308]}']
        for piece in sealer.seal(self.random.choice(texts)):
            guest.sendall(b"".join(piece))


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_messages_change_nothing_and_take_nothing(count: int) -> None:
    job.stop_workers()
    data, vandals = loader(tokens(24)), Vandals(count)
    expected = train(Configured, data, 1)
    found = train(Configured, data, 3, {"num_microbatches": 4}, callbacks=[vandals])
    assert_same_run(found, expected)
    assert sum(vandals.sent.values()) == (count + 100) * len(vandals.ports)
    assert vandals.after[0] - vandals.before[0] < 50
    assert vandals.after[1] - vandals.before[1] <= 8


def test_no_command_line_and_no_message_shows_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    train(Configured, loader(tokens(8)), 3, {"num_microbatches": 4}, max_steps=1)
    secrets = {entry.pool.secret for entry in job._registry.values() if isinstance(entry, job.DriverJob)}
    assert secrets
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert any("skippipe_plugin.worker" in line for line in lines)
    lines += [record.getMessage() for record in caplog.records]
    assert not [line for line in lines for secret in secrets if secret in line]
