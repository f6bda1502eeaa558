"""Strangers at every port of a run: refused, and the run unharmed. The secret is nowhere to be read."""

import contextlib
import logging
import os
import socket
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.engine.handshake import PROTOCOL_VERSION
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
    assert len(strangers.ports) == 2  # the door and the store: those of the groups are shut
    lines = [record.getMessage() for record in caplog.records]
    for reason in ("speaks HTTP", "speaks TLS", "does not know this job's secret"):
        assert sum("refused a connection from 127.0.0.1:" in line and reason in line for line in lines) == 1


def test_no_command_line_and_no_message_shows_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    train(Configured, loader(tokens(8)), 3, {"num_microbatches": 4}, max_steps=1)
    secrets = {entry.pool.secret for entry in job._registry.values() if isinstance(entry, job.DriverJob)}
    assert secrets
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert any("skippipe_plugin.worker" in line for line in lines)
    lines += [record.getMessage() for record in caplog.records]
    assert not [line for line in lines for secret in secrets if secret in line]
