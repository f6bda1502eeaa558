"""A worker on another host, whose link is cut, and perhaps repaired. The host is a network namespace: needs root."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import StageLostError
from skippipe_plugin.strategies import NetworkConfig, stop_workers
from tests.processes.nodes import Cable, Node, cable_to_a_node
from tests.processes.support import wait_until

from .test_recovery import At, assert_counted, kill, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are made by root"),
]
PORT = 29479
ENDS_WITHIN_S = 60
"""More than a link may be silent for, and what a process needs to say so on a busy machine."""


class Hosts:
    """This host, which has the driver and two workers, and another one, from where the last worker joins."""

    def __init__(self, cable: Cable, secret: Path) -> None:
        self.cable = cable
        self.secret = secret
        self.joined: list[subprocess.Popen[str]] = []
        self.network = NetworkConfig(host=cable.address, port=PORT, secret_file=str(secret), local_workers=2)

    def join(self, node: Node | None) -> None:
        command = [sys.executable, "-m", "skippipe_plugin.cli", "worker", "--join", f"{self.cable.address}:{PORT}"]
        command += ["--secret-file", str(self.secret), "--wait", "60"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        prefix = node.prefix if node is not None else []
        self.joined.append(subprocess.Popen([*prefix, *command], env=environment, stderr=subprocess.PIPE, text=True))

    def join_when_there_is_a_secret(self) -> None:
        assert wait_until(self.secret.exists)
        self.join(self.cable.node)

    def end_of(self, index: int) -> tuple[int, str]:
        """Wait for a worker that joined; return its exit status and what it said."""
        _, said = self.joined[index].communicate(timeout=ENDS_WITHIN_S)
        return self.joined[index].returncode, said

    def forget_quickly(self) -> None:
        """Let the other host's kernel drop connections of ended processes that nobody answers at once."""
        setting = "net.ipv4.tcp_orphan_retries=1"
        subprocess.run([*self.cable.node.prefix, "sysctl", "-q", "-w", setting], check=True)

    def open_connections(self) -> list[str]:
        """List the other host's connections."""
        listing = [*self.cable.node.prefix, sys.executable, "-c", "print(open('/proc/net/tcp').read())"]
        lines = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        return [line for line in lines if line.strip()]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with cable_to_a_node() as cable:
        hosts = Hosts(cable, tmp_path / "secret")
        starter = threading.Thread(target=hosts.join_when_there_is_a_secret)
        starter.start()
        yield hosts
        starter.join()
        stop_workers()
        for process in hosts.joined:
            process.kill()
            process.communicate()


def test_a_worker_that_was_cut_off_has_no_say_and_may_join_anew(hosts: Hosts) -> None:
    """It is replaced. When the link is repaired it is told so; and then it replaces another one."""

    def cut(trainer: Trainer) -> None:
        cut_off.extend({1, 2, 3} - trainer.strategy.worker_pids.keys())
        hosts.cable.cut()
        hosts.join(None)  # who will take over

    def repair(trainer: Trainer) -> None:
        hosts.cable.repair()
        status, said = hosts.end_of(0)
        assert status == 1
        assert "join anew" in said or "join it again" in said
        hosts.join(hosts.cable.node)
        assert wait_until(lambda: trainer.strategy._job.pool.num_idle > 0)  # before somebody is lost

    cut_off: list[int] = []
    recovery = StageRecovery(spares=0, heartbeat_s=2.0)
    happenings = [
        At("on_train_batch_start", 3, cut),
        At("on_train_batch_start", 5, repair),
        At("on_train_batch_start", 6, kill(2)),
    ]
    result, _ = run(*happenings, recovery=recovery, strategy={"network": hosts.network})
    assert_counted(result)
    assert [(event.rank, event.how_lost) for event in recovery.events] == [
        (*cut_off, "it gave no sign of life"),
        (2, "its process ended or its link broke"),
    ]
    stop_workers()
    assert hosts.end_of(2)[0] == 0


def test_connections_that_are_half_open_are_given_up(hosts: Hosts) -> None:
    """Its last words are lost with its host: this end's connections stay open until the other says that it has none."""

    def lose(trainer: Trainer) -> None:
        lost.extend({1, 2, 3} - trainer.strategy.worker_pids.keys())
        hosts.cable.cut()
        hosts.joined[0].kill()
        hosts.joined[0].wait()
        assert wait_until(lambda: not hosts.open_connections())  # their kernel has given up to say goodbye
        hosts.cable.repair()
        hosts.join(None)  # who will take over

    hosts.forget_quickly()
    lost: list[int] = []
    recovery = StageRecovery(spares=0, heartbeat_s=2.0)
    happenings = [At("on_train_batch_start", 3, lose)]
    result, _ = run(*happenings, recovery=recovery, strategy={"network": hosts.network})
    assert_counted(result)
    assert [event.rank for event in recovery.events] == lost
    stop_workers()
    assert hosts.end_of(1)[0] == 0


def test_a_link_that_stays_cut_is_an_error_at_both_ends(hosts: Hosts) -> None:
    """Without StageRecovery nobody asks for signs of life but the kernels."""
    how = "its process ended or its link broke|it gave no sign of life when a connection broke"
    with pytest.raises(StageLostError, match=rf"rank 3 \(stage 3\) is gone: ({how})"):
        run(At("on_train_batch_start", 3, lambda _: hosts.cable.cut()), strategy={"network": hosts.network})
    status, said = hosts.end_of(0)
    assert status == 1
    assert f"the driver at {hosts.cable.address}:{PORT} is gone: it ended, or the link broke" in said
