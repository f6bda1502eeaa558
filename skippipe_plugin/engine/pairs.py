"""Links as NCCL needs them: a group of two ranks for each direction, without tags, in the sender's order.

A receive of NCCL that waits is a running kernel, and loading another kernel or freeing memory may wait for all running
ones; so none is posted ahead. It is issued when its action comes, after those of the same link that are sent before
it. Gloo takes the same discipline, on host memory: that is how it is tested where there are no GPUs.

The rules, each with where it is kept:

1. Both ends of a link issue its messages in the sender's order (``Executor._post_up_to``, by ``Link.place``).
2. A receive is issued last of what its action needs: its buffer is allocated before.
3. There is a group for each link of a schedule, and none for long beside them: links that are only measured are given
   back (:meth:`PairTransport.disconnect`).
4. What CUDA reads when it starts is set before it starts, or the run is refused (:func:`prepare`).
5. A wait says that the GPU will wait, not that a message is here: before user code sees values, and at the end of a
   step, the device is waited for, and a generation that was given up raises (:meth:`PairTransport.confirm`).

One is not kept yet: a send is a running kernel too, until it is taken. A sender whose allocator gives memory back to
the device in the meantime waits for that, and stands still if who is to take it waits for the sender.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from .c10d import Gloo, ProcessGroupNCCL, Store
from .device import HOST, make_current, synchronize
from .errors import SkipPipeError
from .transport import FOREVER, PendingTensor, TensorSpec, Transport, form_gloo, room
from .waiting import Waiting

PairBackend = Literal["gloo", "nccl"]
LinkBackend = Literal["gloo", "gloo-pairs", "nccl"]
"""What carries hidden states and gradients: one gloo group of all ranks, or a group for each link."""

_WATCHDOG: Final = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""The control channels find failures, so NCCL's own watchdog may not end the process."""
_LOADING: Final = "CUDA_MODULE_LOADING"
"""Kernels are to be loaded at once rather than while receives run."""
_NCCL: Final[Any] = ProcessGroupNCCL or ()
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
        self._leaving: list[Gloo] = []
        """Groups that are given back but may still be writing what was sent last."""
        self._formed: Counter[tuple[int, int]] = Counter()
        """How often each link was formed: a store hands out the names of a group once."""

    def leave_store(self) -> None:
        """Keep it: a schedule that comes later may use further links."""

    def connect(self, links: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
        """Form the links that are new and try them out, in the same order on all ranks: nobody waits in a circle."""
        fresh = sorted(set(links) - self._links)
        for source, destination in fresh:
            self._links.add((source, destination))
            self._formed[source, destination] += 1
            if self.rank not in (source, destination):
                continue
            name, form = _name(source, destination), self._form_nccl if self._backend == "nccl" else self._form_gloo
            self._connect(name, (source, destination), form, attempt=self._formed[source, destination])
            if self.rank == source:
                self.send(torch.zeros(1), destination, 0)
                self.end_step()
            else:
                self.receive(TensorSpec((1,), torch.float32), source, 0, self._device).wait()
        return fresh

    def disconnect(self, links: Collection[tuple[int, int]]) -> None:
        """Give links back whose messages were all received; every member calls this with the same ones."""
        synchronize(self._device)
        for source, destination in links:
            self._links.discard((source, destination))
            group = self._groups.pop(_name(source, destination), None)
            if group is None:
                continue
            if isinstance(group, _NCCL):
                group.shutdown()
            else:
                self._leaving.append(group)

    def flush(self) -> None:
        """See :meth:`Transport.flush`."""
        super().flush()
        self._leaving.clear()

    def _open_groups(self) -> list[Gloo]:
        return [*super()._open_groups(), *self._leaving]

    def confirm(self) -> None:
        """See :meth:`Transport.confirm`."""
        synchronize(self._device)
        super().confirm()

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """See :meth:`Transport.send`."""
        if not tensor.numel():
            return
        data, staging = tensor.detach(), self._staging
        if staging is not None and self._backend == "gloo":
            if staging.send(data, functools.partial(self._post, destination, tag)):
                return
            staging.settle()  # there are no tags: nothing may overtake what is on its way from the device
        self._post(destination, tag, data.to(self._device).contiguous())

    def _post(self, destination: int, tag: int, data: Tensor) -> None:
        group = self._groups[_name(self.rank, destination)]
        self._sends.append((self._start(lambda: group.send([data], _DESTINATION, 0), destination), data))
        self._traffic.send(destination, 0)

    def receive(self, spec: TensorSpec, source: int, tag: int, device: torch.device) -> PendingTensor:
        """Issue the receive of the link's next message."""
        form = spec.in_memory
        if self._backend == "gloo":
            staging = None if device.type == "cpu" else self._staging
            buffer = room(staging, form.shape, form.dtype)
        else:
            staging, buffer = None, torch.empty(form.shape, dtype=form.dtype, device=self._device)
        group = self._groups[_name(source, self.rank)]
        work = self._start(lambda: group.recv([buffer], _SOURCE, 0), source) if buffer.numel() else None
        is_seen = work is not None and self._backend == "gloo"  # nobody can tell whether bytes move under NCCL
        awaited = self._traffic.receive(source, 0) if is_seen else None
        return PendingTensor(work, buffer, device, self._waiting, awaited, None, staging, spec.order)

    def end_step(self) -> None:
        """Wait until every send of this step has been taken, as far as who waits can be woken: under NCCL."""
        if self._backend == "nccl":  # a finished wait only means that the GPU will wait
            self.flush()
            self.confirm()
        else:
            super().end_step()

    def _break_off(self, group: Gloo) -> None:
        if isinstance(group, _NCCL):
            group.abort()
        else:
            super()._break_off(group)

    def _form_nccl(self, store: Store, rank: int, size: int) -> Gloo:
        options = ProcessGroupNCCL.Options()
        options._timeout = FOREVER
        make_current(self._device)
        return ProcessGroupNCCL(store, rank, size, options)

    def _form_gloo(self, store: Store, rank: int, size: int) -> Gloo:
        return form_gloo(store, rank, size, self._host, self._traffic.connections)


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


def prepare(backend: LinkBackend) -> None:
    """Set what a backend needs of the process, before anything in it starts a device.

    Raises:
        SkipPipeError: It is too late: CUDA has started.
    """
    if backend != "nccl":
        return
    os.environ.setdefault(_WATCHDOG, "0")
    if os.environ.get(_LOADING) == "EAGER":
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call, unused-ignore]
        found = os.environ.get(_LOADING, "LAZY")
        raise SkipPipeError(
            f"backend='nccl' needs {_LOADING}=EAGER, since a kernel that is loaded while a message is awaited may wait "
            f"for that message; but CUDA has started in this process with {found}. Set the variable before the script "
            "starts, or use backend='gloo'"
        )
    os.environ[_LOADING] = "EAGER"


def _check_nccl(device: torch.device) -> None:
    if ProcessGroupNCCL is None:
        raise SkipPipeError("backend='nccl', but torch was built without NCCL here; use backend='gloo'")
    if device.type != "cuda":
        raise SkipPipeError(f"backend='nccl' needs a GPU for every process, but one has {device}; use backend='gloo'")
    prepare("nccl")


def _name(source: int, destination: int) -> str:
    return f"{source}to{destination}"
