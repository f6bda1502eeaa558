"""The names of torch's C++ distributed layer that the engine uses, in one place: torch exports them untyped."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, Work

from .listener import listen

Gloo = Any
"""A ``ProcessGroupGloo``, whose operations torch's stubs do not list."""
ProcessGroupGloo: Any = torch._C._distributed_c10d.ProcessGroupGloo
ProcessGroupNCCL: Any = getattr(torch._C._distributed_c10d, "ProcessGroupNCCL", None)
"""None where torch was built without NCCL."""

_PATIENCE: Final = timedelta(minutes=5)

__all__ = ["Gloo", "PrefixStore", "ProcessGroupGloo", "ProcessGroupNCCL", "Store", "TCPStore", "Work", "host_store"]


def host_store(host: str, port: int = 0, timeout: timedelta = _PATIENCE) -> TCPStore:
    """Host a store on ``host:port`` (port 0: any free one), and on no other address: by itself torch takes them all.

    Raises:
        SkipPipeError: The address is not ours or the port is taken.
    """
    bound = listen(host, port)
    port = bound.getsockname()[1]
    # The store closes the descriptor. Its own client asks localhost unless it is told better.
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=bound.detach()
    )
