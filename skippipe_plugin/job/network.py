"""Where the processes of a job meet."""

from __future__ import annotations

from dataclasses import dataclass

from ..checked import NUM_PROCESSES, NUM_SPARES, SECONDS, Range, checked
from ..engine.listener import every_address, is_every_address
from ..engine.pairs import LinkBackend
from ..sources import Workers, workers_of


@checked(port=Range(0, 65535), local_workers=NUM_SPARES, join_timeout_s=SECONDS, workers_per_device=NUM_PROCESSES)
@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Where the driver and its workers meet."""

    host: str | None = None
    """The address the driver listens on and its groups bind to; workers on other hosts must be able to reach it. None:
    this machine only (127.0.0.1), or under a launcher the interface that leads to the launcher's main address."""
    port: int = 0
    """The port of the control channels; 0 takes any free one."""
    secret_file: str | None = None
    """The file with the job's secret, of mode 0600; written with a new one when it is not there. When None, the
    environment has the secret (``SKIPPIPE_SECRET``) or its file (``SKIPPIPE_SECRET_FILE``), or nobody joins by hand."""
    workers: Workers | None = None
    """Where workers come from. ``"local"``: processes of the driver's own host. ``"launched"``: the ranks of a
    launcher, or workers that join by hand. ``"ray"``: actors of a Ray cluster. ``"slurm"``: tasks of job arrays, which
    the driver submits. ``"kubernetes"``: pods, which join by themselves. A function that returns a
    :class:`~skippipe_plugin.sources.WorkerSource`: that one's. None: what the variable ``SKIPPIPE_WORKERS`` names, else
    the launcher's ranks where there is one, else local ones."""
    local_workers: int | None = None
    """How many workers the driver starts on its own host at most; others join by hand. None: all that are needed."""
    join_timeout_s: float = 180.0
    """For how many seconds the start of a run, or a recovery, waits for workers to join."""
    backend: LinkBackend = "gloo"
    """What carries hidden states and gradients. ``"gloo"``: through host memory, whatever the device. ``"nccl"``: from
    GPU to GPU, one for each process; it has not run on such machines yet. ``"gloo-pairs"``: gloo in the order and the
    groups that NCCL needs, to try that out without GPUs."""

    workers_per_device: int = 1
    """How many of the processes may compute on one device, the driver among them, such as all on a machine with one
    GPU. ``Trainer(devices=N)`` then makes that many times N processes."""

    def __post_init__(self) -> None:
        if self.host is not None and is_every_address(self.host):
            raise ValueError(every_address(self.host))
        workers = workers_of(self.workers)
        if self.local_workers is not None and workers not in (None, "local"):
            raise ValueError(
                f"local_workers={self.local_workers} limits the workers of this host, and workers={workers!r} "
                "takes none of this host's; give one of them"
            )
