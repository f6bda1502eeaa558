"""What a launcher (torchrun, SLURM, ...) says about this process, and which source of workers that leaves."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from ..engine.c10d import TCPStore, host_store
from ..engine.errors import SkipPipeError
from ..sources import Workers, workers_of
from ..supervisor import supervised

MEET: Final = timedelta(minutes=30)
"""How long ranks of a launcher wait for each other; as long as torch's process groups do."""


@dataclass(frozen=True, slots=True)
class Launcher:
    """What a launcher (torchrun, SLURM, ...) says about this process."""

    rank: int
    address: str
    """Where the launcher's store is, or where rank 0 is to host it."""
    port: int
    hosts_store: bool
    """Whether the launcher itself hosts the store."""
    num_nodes: int = 1
    """On how many machines the processes run."""
    device: str = ""
    """What this process is to compute on; empty: its driver chooses."""

    def store(self) -> TCPStore:
        """Connect to the store that all ranks share."""
        if self.rank == 0 and not self.hosts_store:
            return host_store(self.own_address(), self.port, MEET)
        return TCPStore(self.address, self.port, is_master=False, timeout=MEET)

    def own_address(self) -> str:
        """The address of this process as the others can reach it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self.address, self.port))
            host = str(probe.getsockname()[0])
        if self.num_nodes > 1 and ipaddress.ip_address(host).is_loopback:
            raise SkipPipeError(
                f"rank {self.rank} would be at {host}, where the other {self.num_nodes - 1} nodes cannot reach it: the "
                f"launcher's main address {self.address!r} must be one that all nodes know"
            )
        return host


def chosen_workers(setting: Workers | None, launcher: Launcher | None, num_drivers: int) -> Workers:
    """Return where this process's workers come from: as set, else the launcher's ranks, else this host.

    Raises:
        SkipPipeError: What was set does not go together with how this process was started.
    """
    if launcher is not None and launcher.rank > 0:
        return "launched"  # the first driver's setting counts
    workers = workers_of(setting)
    if launcher is not None:
        if workers not in (None, "launched"):
            raise SkipPipeError(
                f"workers={workers!r} brings workers, and a launcher has started this process among several; start the "
                "script alone (python train.py), or leave workers out and the other processes are the workers"
            )
        return "launched"
    if supervised() and workers not in (None, "local", "launched"):
        raise SkipPipeError(
            f"skippipe run keeps the workers itself, so that they outlive the driver, and cannot take them from "
            f"workers={workers!r}; start the script without skippipe run, or leave workers out"
        )
    if num_drivers > 1 and workers not in (None, "local"):
        raise SkipPipeError(
            f"workers={workers!r} takes one driver, and this run has drivers={num_drivers}; use drivers=1, or "
            "workers='local'"
        )
    return workers or "local"
