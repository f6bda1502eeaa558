"""Of two drivers one is lost, or cut off: the other one ends with an error that says so, and does not wait for ever."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from skippipe_plugin.engine.c10d import TCPStore, host_store
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import drivers
from skippipe_plugin.testing import sockets

OTHER = """
import sys
from skippipe_plugin.engine.c10d import TCPStore
from skippipe_plugin.strategies.drivers import DriversStrategy
strategy = DriversStrategy(2)
strategy.global_rank = 1
strategy.form_default_group(TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False))
strategy.gather_objects(1)
sys.stdin.read()
"""
SILENT_S = 2.0


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[drivers.DriversStrategy, subprocess.Popen[bytes]]]:
    """This process as the first driver, and another process as the second one."""
    monkeypatch.setattr(drivers, "_SILENT_S", SILENT_S)
    store: TCPStore = host_store("127.0.0.1")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OTHER, str(store.port)]
    other = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    strategy = drivers.DriversStrategy(2)
    strategy.global_rank = 0
    strategy.form_default_group(store)
    assert strategy.gather_objects(0) == [0, 1]
    yield strategy, other
    dist.destroy_process_group()
    other.kill()
    other.communicate()


def test_a_driver_that_ended_is_named(pair: tuple[drivers.DriversStrategy, subprocess.Popen[bytes]]) -> None:
    strategy, other = pair
    other.kill()
    other.wait()
    for ask in (strategy.gather_objects, strategy.broadcast, strategy.reduce, strategy.all_gather, strategy.barrier):
        with pytest.raises(SkipPipeError, match="another driver is gone: it ended"):
            ask(torch.ones(1))


@pytest.mark.timeout(60)
def test_a_driver_that_is_cut_off_is_not_waited_for(
    pair: tuple[drivers.DriversStrategy, subprocess.Popen[bytes]],
) -> None:
    strategy, other = pair
    ends = [end for ends in sockets.connections(os.getpid(), other.pid) for end in ends]
    assert ends
    for end in ends:
        sockets.silence(end)
    begun_s = time.monotonic()
    with pytest.raises(SkipPipeError, match="or the link to it broke"):
        strategy.gather_objects(0)
    assert time.monotonic() - begun_s < 10 * SILENT_S
    for end in ends:
        end.close()
