"""What a launcher in torchrun's manner says about this process in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ..engine.errors import SkipPipeError
from .launcher import Launcher

RANK_VARIABLES: Final = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""By which other libraries find the launcher."""


def read_launcher(environment: Mapping[str, str]) -> tuple[Launcher | None, int | None]:
    """Return the launcher, and how many processes it has started; None and None without one, or of one process."""
    num_processes = int(environment.get("WORLD_SIZE", "1"))
    if "RANK" not in environment or num_processes == 1:
        return None, None
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise SkipPipeError(f"RANK={environment['RANK']} is set without {' and '.join(missing)}; set all, or none")
    hosts_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    num_nodes = num_processes // int(environment.get("LOCAL_WORLD_SIZE", num_processes))
    rank = int(environment["RANK"])
    return Launcher(rank, address, port, hosts_store=hosts_store, num_nodes=num_nodes), num_processes
