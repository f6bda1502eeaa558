"""Members that have found each other and cannot be connected: forming ends, and says who they are."""

import threading
import time
from typing import Any

import pytest
from torch.distributed import HashStore

from skippipe_plugin.engine import transport as transport_module
from skippipe_plugin.engine.errors import GenerationAborted
from skippipe_plugin.engine.rendezvous import AbortableStore
from skippipe_plugin.engine.transport import Transport


def test_a_store_that_is_waited_for_is_not_idle() -> None:
    inner = HashStore()
    store = AbortableStore(inner, "here/", threading.Event())
    assert store.idle_s < 0
    threading.Timer(0.3, inner.set, ["here/address", "1"]).start()
    assert store.get("address") == b"1"
    assert 0 <= store.idle_s < 0.25
    time.sleep(0.3)
    assert store.idle_s > 0.25


def test_members_that_cannot_be_connected_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where packets are dropped: the system tries for minutes, and cannot be interrupted."""
    over = threading.Event()

    def form(store: Any, rank: int, size: int, **_: Any) -> str:
        store.set(str(rank), "address")
        for other in range(size):
            store.get(str(other))
        if rank != 0:
            over.wait(30)
        return "a group"

    monkeypatch.setattr(transport_module, "form_gloo", form)
    monkeypatch.setattr(transport_module, "_CONNECT_S", 0.3)
    store = HashStore()
    ranks = [Transport(store, rank=rank, members=(0, 4, 5), generation=2, host="127.0.0.1") for rank in (0, 4, 5)]
    failed: list[int] = []

    def run(rank: Transport) -> None:
        if rank.rank == 0:
            rank.form()
            return
        with pytest.raises(GenerationAborted, match=r"could not all be connected within 0\.3 s"):
            rank.form()
        failed.append(rank.rank)

    threads = [threading.Thread(target=run, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    assert sorted(failed) == [4, 5]
    assert ranks[0].unreached() == [4, 5]
