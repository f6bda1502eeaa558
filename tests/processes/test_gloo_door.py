"""Who comes to the port of a group that is formed is refused, and the group does not mind."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from skippipe_plugin.engine.c10d import PrefixStore, Store, TCPStore, host_store
from skippipe_plugin.engine.errors import GenerationAborted
from skippipe_plugin.engine.gloo_door import open_device
from skippipe_plugin.engine.transport import TensorSpec, Transport
from tests.grids import slow
from tests.processes.support import wait_until

NUMBERS = TensorSpec((4,), torch.float32)


def member(store: Store, rank: int, generation: int) -> Transport:
    transport = Transport(
        PrefixStore("a job", store), rank=rank, members=(0, 1), generation=generation, host="127.0.0.1"
    )
    transport.form()
    return transport


def partner(port: int, count: int) -> None:
    """The other process: send back what comes, in one generation after the other."""
    store = TCPStore("127.0.0.1", port, is_master=False)
    for generation in range(count):
        transport = member(store, 1, generation)
        with contextlib.suppress(GenerationAborted):
            transport.send(transport.receive(NUMBERS, 0, 1, torch.device("cpu")).wait() + 1, 0, 2)
            transport.flush()
        store.set(f"over {generation}", "")
        transport.poison()


@pytest.fixture
def store() -> TCPStore:
    return host_store("127.0.0.1")


def with_partner(store: TCPStore, count: int) -> subprocess.Popen[bytes]:
    code = f"from tests.processes.test_gloo_door import partner; partner({store.port}, {count})"
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


def listening(pid: int) -> set[int]:
    links = psutil.Process(pid).net_connections("tcp")
    return {link.laddr[1] for link in links if link.status == psutil.CONN_LISTEN}


def files() -> int:
    gc.collect()
    return psutil.Process().num_fds()


@pytest.mark.parametrize("ends", ["in peace", slow("broken off")])
def test_nobody_is_let_in_once_all_are_there(store: TCPStore, ends: str) -> None:
    count, before, others = 4, files(), listening(os.getpid())
    process = with_partner(store, count)
    try:
        for generation in range(count):
            transport = member(store, 0, generation)
            assert listening(os.getpid()) == others
            assert wait_until(lambda: not listening(process.pid), timeout_s=10)
            if ends == "in peace":
                transport.send(torch.arange(4.0), 1, 1)
                back = transport.receive(NUMBERS, 1, 2, torch.device("cpu")).wait()
                assert back.tolist() == [1, 2, 3, 4]
                transport.flush()
            transport.poison()
            store.wait([f"over {generation}"])
            del transport
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert files() <= before + 1  # the first group may open something that stays


def test_strangers_leave_no_descriptor_behind(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own switch keeps the door open, so this also shows what it is shut against."""
    kept = {}
    for lazy in ("0", "1"):
        monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", lazy)
        others = listening(os.getpid())
        device, door = open_device("127.0.0.1")
        (port,) = listening(os.getpid()) - others
        if door is not None:
            door.shut()
        before = files()
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as guest:
                guest.sendall(bytes(8))
        kept[lazy] = files() - before
        del device
    assert kept["0"] == 0
    assert kept["1"] > 0, "gloo keeps nobody any more: this module can go"
