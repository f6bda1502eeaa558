"""Several drivers, as Lightning sees them: ranks, the drivers' own process group, and what they share.

With one driver this is a single-device strategy. With more, torch's default group holds the drivers, and only them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available, _sync_ddp_if_available
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import ParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from typing_extensions import override

from ..engine.c10d import PrefixStore, Store
from ..engine.device import for_gloo
from ..engine.errors import SkipPipeError
from ..engine.silence import silence_ends_after
from ..job.launcher import Launcher

_SILENT_S: Final = 15.0
"""For how long another driver may take nothing of what was sent: its host is gone, or a cable is cut."""


class DriversStrategy(SingleDeviceStrategy):
    """The part of the strategy that knows of other drivers; abstract."""

    def __init__(self, drivers: int, *, brings_workers: bool = False, per_device: int = 1) -> None:
        super().__init__()
        self.drivers = drivers
        self._brings_workers = brings_workers
        """Whether the driver's workers come from a source that was chosen: a launcher of one process is none then."""
        self._per_device = per_device
        """How many of the processes share one of the Trainer's devices."""
        # The Trainer fills these in; their presence is how Lightning tells a strategy for several processes.
        self.process_devices: list[torch.device] | None = None
        """One for each process of a node, drivers and workers; :attr:`parallel_devices` are the drivers' alone."""
        self.process_nodes = 1
        """How many nodes there are; :attr:`num_nodes` are the drivers' alone."""
        self.cluster_environment: Any = None  # Any: Lightning's ClusterEnvironment

    @property
    def num_processes(self) -> int:
        """Drivers and workers together, over all nodes."""
        return len(self.process_devices or [None]) * self.process_nodes

    # What a Trainer says of its devices, and user code divides its steps by, is what it says of the drivers: workers
    # share none of the data.

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices of the drivers on a node; the Trainer sets those of all processes."""
        return self.process_devices[: self.drivers] if self.process_devices else None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self.process_devices = None if devices is None else [each for each in devices for _ in range(self._per_device)]

    @property
    def num_nodes(self) -> int:
        """How many nodes have drivers, which are the first ranks; the Trainer sets how many there are."""
        return -(-self.drivers // len(self.process_devices or [None])) if self.process_nodes > 1 else 1

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self.process_nodes = num_nodes

    @property
    @override
    def root_device(self) -> torch.device:
        return self.process_devices[self.local_rank] if self.process_devices else self._root_device

    @property
    def is_distributed(self) -> bool:
        """Whether several drivers share the data (Lightning asks before it injects a DistributedSampler)."""
        return self.drivers > 1

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """The data is shared among the drivers only."""
        return {"num_replicas": self.drivers, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Learn this process's rank from the launcher; called by the Trainer."""
        launcher = self.read_launcher()
        self.global_rank = launcher.rank if launcher is not None else 0
        self.local_rank = self.cluster_environment.local_rank() if launcher is not None else 0
        self.world_size = self.drivers
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def read_launcher(self) -> Launcher | None:
        """Return what an external launcher says about this process; None when there is none."""
        environment = self.cluster_environment
        if environment is None or isinstance(environment, LightningEnvironment):
            return None
        if self._brings_workers and environment.world_size() == 1:
            return None
        hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launcher(
            environment.global_rank(),
            environment.main_address,
            environment.main_port,
            hosts_store=hosts_store,
            num_nodes=self.process_nodes,
            device=str(self.process_devices[environment.local_rank()]) if self.process_devices else "",
        )

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def form_default_group(self, store: Store) -> None:
        """Form torch's default group of the drivers, unless the user has formed it."""
        if not dist.is_initialized():
            prefixed = PrefixStore("skippipe/drivers", store)
            with silence_ends_after(_SILENT_S):
                dist.init_process_group("gloo", store=prefixed, rank=self.global_rank, world_size=self.drivers)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if isinstance(tensor, Tensor) and self.drivers > 1:
            with _while_all_live():
                return _sync_ddp_if_available(for_gloo(tensor), group, reduce_op=reduce_op).to(tensor.device)
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        with _while_all_live():
            gathered = _all_gather_ddp_if_available(for_gloo(tensor), group=group, sync_grads=sync_grads)
            return gathered.to(tensor.device)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.drivers == 1:
            return decision
        votes = int(self.reduce(torch.tensor(float(decision)), reduce_op="sum"))
        return votes == self.drivers if all else votes > 0

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self.drivers > 1 and dist.is_initialized():
            with _while_all_live():
                dist.barrier()

    def block_backward_sync(self) -> AbstractContextManager[None]:
        """Gradients of drivers are summed inside the step; there is nothing to hold back."""
        return nullcontext()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.drivers == 1 or not dist.is_initialized():
            return obj
        objects = [obj]
        with _while_all_live():
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Give every driver what each of them has."""
        if self.drivers == 1 or not dist.is_initialized():
            return [obj]
        objects: list[Any] = [None] * self.drivers
        with _while_all_live():
            dist.all_gather_object(objects, obj)
        return objects


@contextmanager
def _while_all_live() -> Iterator[None]:
    """Say what a broken connection between drivers means: gloo names an address, and guesses."""
    try:
        yield
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise SkipPipeError(
            "another driver is gone: it ended, and says above or in its own output why, or the link to it broke. A run "
            "with several drivers cannot go on without one; start it again from the last checkpoint"
        ) from error


# Lightning gives a DistributedSampler to subclasses of ParallelStrategy only; with one driver it makes no difference.
ParallelStrategy.register(DriversStrategy)
