"""A generation that is given up while a worker has not even begun with it."""

import threading
import time
from typing import Any

import pytest

from skippipe_plugin.engine import rendezvous
from skippipe_plugin.engine.c10d import TCPStore
from skippipe_plugin.engine.channel import connect
from skippipe_plugin.engine.control.answers import Failed
from skippipe_plugin.engine.control.commands import Abort, Configure
from skippipe_plugin.engine.control.line import to_worker
from skippipe_plugin.engine.control.presence import Exit
from skippipe_plugin.engine.listener import Listener
from skippipe_plugin.worker import Worker

HOST, SECRET = "127.0.0.1", b"the job's secret"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("store_is_gone", [False, True])
def test_an_abort_that_overtakes_its_generation_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, *, store_is_gone: bool
) -> None:
    """The worker still connects to the store, or tries to: the driver has given the generation up, and it with that."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    port = store.port

    def connect_slowly(host: str, port: int, **options: Any) -> TCPStore:
        time.sleep(0.3)
        return TCPStore(host, port, **options)

    if store_is_gone:
        del store
    else:
        monkeypatch.setattr(rendezvous, "TCPStore", connect_slowly)
    listener = Listener(HOST, 0, SECRET)
    arrived: list = []
    accepting = threading.Thread(target=lambda: arrived.append(listener.accept(timeout_s=10)))
    accepting.start()
    channel = connect(HOST, listener.port, SECRET)
    channel.send("Hello")
    accepting.join()
    driver = to_worker(arrived[0][0])
    worker = Worker(channel)
    serving = threading.Thread(target=worker.serve, daemon=True)
    serving.start()
    driver.send(
        Configure(
            generation=4,
            rank=1,
            members=[0, 1],
            store_host=HOST,
            store_port=port,
            other_drivers=[],
            may_leave=False,
            sys_path=[],
            num_threads=1,
            device="cpu",
            backend="gloo",
            replica_groups=[],
            expert_sets=[],
            schedules={},
            step=0,
        )
    )
    driver.send(Abort(4))
    answer = driver.receive().body
    assert isinstance(answer, Failed)
    assert answer.aborted
    driver.send(Exit())
    serving.join(10)
    assert not serving.is_alive()
    driver.channel.close()
    listener.close()
