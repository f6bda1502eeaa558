"""The names of torch's C++ distributed layer that the engine uses, in one place: torch exports them untyped."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore, Work

Gloo = Any
"""A ``ProcessGroupGloo``, whose operations torch's stubs do not list."""
ProcessGroupGloo: Any = torch._C._distributed_c10d.ProcessGroupGloo

__all__ = ["Gloo", "PrefixStore", "ProcessGroupGloo", "Store", "TCPStore", "Work"]
