"""Links as NCCL needs them: a group of two ranks for each direction, without tags, in the sender's order.

A receive of NCCL that waits is a running kernel, and loading another kernel or freeing memory may wait for all running
ones; so none is posted ahead. It is issued when its action comes, after those of the same link that are sent before
it. Gloo takes the same discipline, on host memory: that is how it is tested where there are no GPUs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from .c10d import Gloo, ProcessGroupNCCL, Store
from .device import HOST, make_current, synchronize
from .errors import GenerationAborted, SkipPipeError
from .transport import FOREVER, PendingTensor, TensorSpec, Transport, form_gloo
from .waiting import Waiting

PairBackend = Literal["gloo", "nccl"]
LinkBackend = Literal["gloo", "gloo-pairs", "nccl"]
"""What carries hidden states and gradients: one gloo group of all ranks, or a group for each link."""

_ENVIRONMENT: Final = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "CUDA_MODULE_LOADING": "EAGER"}
"""The control channels find failures, so NCCL's own watchdog may not end the process; and kernels are loaded at once
rather than while receives run."""
_SOURCE: Final = 0
_DESTINATION: Final = 1
"""The ranks within a link's group."""


class PairTransport(Transport):
    """Links that are groups of two; what several ranks sum goes over gloo.

    Args:
        store: Where the members find each other.
        rank: This rank.
        members: The ranks of this generation, in ascending order.
        generation: The number of the generation.
        host: The address to bind to.
        device: What this rank computes on; for NCCL messages lie there, for gloo in host memory.
        backend: What carries them.
        waiting: Told while this rank waits for others.
    """

    posts_ahead = False

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        members: Sequence[int],
        generation: int,
        host: str,
        device: torch.device,
        backend: PairBackend,
        waiting: Waiting | None = None,
    ) -> None:
        super().__init__(
            store, rank=rank, members=members, generation=generation, host=host, device=device, waiting=waiting
        )
        if backend == "nccl":
            _check_nccl(device)
        self._device = HOST if backend == "gloo" else device
        self._backend = backend
        self._links: set[tuple[int, int]] = set()

    def leave_store(self) -> None:
        """Keep it: a schedule that comes later may use further links."""

    def connect(self, links: Collection[tuple[int, int]]) -> None:
        """Form the links that are new and try them out, in the same order on all ranks: nobody waits in a circle."""
        for source, destination in sorted(set(links) - self._links):
            self._links.add((source, destination))
            if self.rank not in (source, destination):
                continue
            name, form = _name(source, destination), self._form_nccl if self._backend == "nccl" else self._form_gloo
            self._connect(name, (source, destination), form)
            if self.rank == source:
                self.send(torch.zeros(1), destination, 0)
                self.end_step()
            else:
                self.receive(TensorSpec((1,), torch.float32), source, 0, self._device).wait()

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """See :meth:`Transport.send`."""
        data = tensor.detach().to(self._device).contiguous()
        if data.numel():
            group = self._groups[_name(self.rank, destination)]
            self._sends.append((self._start(lambda: group.send([data], _DESTINATION, 0)), data))

    def receive(self, spec: TensorSpec, source: int, tag: int, device: torch.device) -> PendingTensor:
        """Issue the receive of the link's next message."""
        buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        group = self._groups[_name(source, self.rank)]
        work = self._start(lambda: group.recv([buffer], _SOURCE, 0)) if buffer.numel() else None
        return PendingTensor(work, buffer, device, self._waiting)

    def end_step(self) -> None:
        """Wait until every send of this step has been taken, as far as who waits can be woken: under NCCL."""
        if self._backend == "nccl":  # a finished wait only means that the GPU will wait
            self.flush()
            synchronize(self._device)
            if self._aborted.is_set():
                raise GenerationAborted(f"generation {self.generation} was given up")

    def _break_off(self, group: Gloo) -> None:
        if self._backend == "nccl" and isinstance(group, ProcessGroupNCCL):
            group.abort()
        else:
            super()._break_off(group)

    def _form_nccl(self, store: Store, rank: int, size: int) -> Gloo:
        options = ProcessGroupNCCL.Options()
        options._timeout = FOREVER
        make_current(self._device)
        return ProcessGroupNCCL(store, rank, size, options)

    def _form_gloo(self, store: Store, rank: int, size: int) -> Gloo:
        return form_gloo(store, rank, size, self._host)


def transport_for(
    backend: LinkBackend,
    store: Store,
    *,
    rank: int,
    members: Sequence[int],
    generation: int,
    host: str,
    device: str,
    waiting: Waiting | None = None,
) -> Transport:
    """Return the transport of a rank that computes on ``device``; see :class:`Transport` for the rest.

    Raises:
        SkipPipeError: NCCL is asked for where it cannot be.
    """
    kind: Callable[..., Transport] = Transport
    if backend != "gloo":
        kind = functools.partial(PairTransport, backend="nccl" if backend == "nccl" else "gloo")
    return kind(
        store,
        rank=rank,
        members=members,
        generation=generation,
        host=host,
        device=torch.device(device),
        waiting=waiting,
    )


def _check_nccl(device: torch.device) -> None:
    if ProcessGroupNCCL is None:
        raise SkipPipeError("backend='nccl', but torch was built without NCCL here; use backend='gloo'")
    if device.type != "cuda":
        raise SkipPipeError(f"backend='nccl' needs a GPU for every process, but one has {device}; use backend='gloo'")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _name(source: int, destination: int) -> str:
    return f"{source}to{destination}"
