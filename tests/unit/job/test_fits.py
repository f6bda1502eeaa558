"""What a driver does of what the drivers before it have left on workers. Real channels."""

import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from skippipe_plugin.driver import pool as pools
from skippipe_plugin.driver.pool import WorkerPool
from skippipe_plugin.engine.channel import connect
from skippipe_plugin.engine.control.keeping import Drop
from skippipe_plugin.engine.control.line import to_driver
from skippipe_plugin.engine.control.presence import Beat, Hello
from skippipe_plugin.engine.versions import own_versions
from skippipe_plugin.job.fits import Fits


def test_a_worker_that_sleeps_as_all_settles_forgets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wake up, be used and outlive this driver: what it held before must not be taken for what it holds then."""
    monkeypatch.setattr(pools, "_AWAKE_S", 0.3)
    first: Any = SimpleNamespace(attempt=0)
    pool = WorkerPool("127.0.0.1")
    worker = to_driver(connect(*pool.address, bytes.fromhex(pool.secret)))
    try:
        worker.send(Hello(own_versions(), os.getpid()))
        deadline = time.monotonic() + 30
        while not pool.links and time.monotonic() < deadline:
            time.sleep(0.01)
        pool.rouse(1)
        assert not pool.idle()
        Fits(pool, first, SimpleNamespace(is_over=False)).settle()  # type: ignore[arg-type]
        while isinstance(body := worker.receive().body, Beat):
            pass
        assert isinstance(body, Drop)
    finally:
        worker.channel.close()
        pool.close()
