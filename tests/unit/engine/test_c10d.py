"""The store of a job listens where it was told to, and nowhere else."""

import psutil
import pytest

from skippipe_plugin.engine.c10d import TCPStore, host_store
from skippipe_plugin.engine.errors import SkipPipeError


def listening_on(port: int) -> list[str]:
    connections = psutil.Process().net_connections("tcp")
    return [link.laddr.ip for link in connections if link.status == psutil.CONN_LISTEN and link.laddr.port == port]


def test_a_store_has_one_address() -> None:
    store = host_store("127.0.0.1")
    store.set("key", "value")
    assert listening_on(store.port) == ["127.0.0.1"]
    assert TCPStore("127.0.0.1", store.port, is_master=False).get("key") == b"value"
    with pytest.raises(SkipPipeError, match=f"cannot listen on 127.0.0.1:{store.port}"):
        host_store("127.0.0.1", store.port)
