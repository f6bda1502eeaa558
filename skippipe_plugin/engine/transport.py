"""One generation of the engine's process groups: tagged, posted-ahead sends and receives of tensors.

The groups are made by hand from a store and numbered by generation; torch's *default* group is never touched. Gloo
carries the bytes; tensors of other devices are staged through host memory. A send is a rendezvous at every size, so
nothing here waits for a send before :meth:`Transport.flush` at the end of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from .c10d import Gloo, PrefixStore, ProcessGroupGloo, Store, Work
from .errors import GenerationAborted

_FORMING = timedelta(seconds=60)
# Failures are found by the control channels, never by this time-out: it only has to be longer than any step.
_FOREVER = timedelta(days=7)
_POISON_TAG = (1 << 31) - 1
_NOTICE = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor, known to both ends of a message before it is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def as_bytes(tensor: Tensor) -> Tensor:
    """View ``tensor`` as a flat uint8 tensor in host memory, copying only when it must."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor, spec: TensorSpec) -> Tensor:
    """Invert :func:`as_bytes`."""
    return data.view(spec.dtype).reshape(spec.shape)


class PendingTensor:
    """A posted receive."""

    __slots__ = ("_buffer", "_device", "_work")

    def __init__(self, work: Work | None, buffer: Tensor, device: torch.device) -> None:
        self._work, self._buffer, self._device = work, buffer, device

    def wait(self) -> Tensor:
        """Block until the tensor is here; raise GenerationAborted when the generation ends first."""
        if self._work is not None:
            _wait(self._work)
        return self._buffer.to(self._device)


class Transport:
    """The point-to-point links of one rank in one generation."""

    def __init__(self, store: Store, *, rank: int, size: int, generation: int, host: str) -> None:
        self.rank = rank
        self.size = size
        self.generation = generation
        self._store = store
        self._host = host
        self._group = _form(PrefixStore(f"generation/{generation}", store), rank, size, host)
        self._subgroups: dict[str, Gloo] = {}
        self._sends: list[tuple[Work, Tensor]] = []

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Start to send ``tensor``; it is kept alive until :meth:`flush`."""
        data = tensor.detach().to("cpu").contiguous()
        if data.numel():
            self._sends.append((self._start(lambda: self._group.send([data], destination, tag)), data))

    def receive(self, spec: TensorSpec, source: int, tag: int, device: torch.device) -> PendingTensor:
        """Post a receive for a tensor of exactly ``spec``."""
        buffer = torch.empty(spec.shape, dtype=spec.dtype)
        work = self._start(lambda: self._group.recv([buffer], source, tag)) if buffer.numel() else None
        return PendingTensor(work, buffer, device)

    def flush(self) -> None:
        """Wait until every send of this step has been taken by its receiver."""
        sends, self._sends = self._sends, []
        for work, _ in sends:
            _wait(work)

    def form_subgroup(self, name: str, ranks: Sequence[int]) -> None:
        """Form a group of ``ranks`` for :meth:`all_reduce`; every member calls this in the same order."""
        store = PrefixStore(f"generation/{self.generation}/{name}", self._store)
        self._subgroups[name] = _form(store, list(ranks).index(self.rank), len(ranks), self._host)

    def all_reduce(self, tensor: Tensor, name: str) -> None:
        """Sum the host tensor ``tensor`` in place over the subgroup ``name``."""
        _wait(self._start(lambda: self._subgroups[name].allreduce([tensor])))

    def poison(self) -> None:
        """Wake every operation of this generation, from any thread; the groups are useless afterwards.

        A receive that times out makes gloo close all pairs of its group, and blocked operations raise within
        milliseconds; ``abort`` and ``shutdown`` wake nobody (pytorch#130345).
        """
        for group in (self._group, *self._subgroups.values()):
            peer = (group.rank() + 1) % group.size()
            if peer != group.rank():
                with contextlib.suppress(RuntimeError):
                    group.recv([torch.zeros(1)], peer, _POISON_TAG).wait(_NOTICE)

    @staticmethod
    def _start(operation: object) -> Work:
        try:
            return operation()  # type: ignore[operator, no-any-return]
        except RuntimeError as error:
            raise GenerationAborted(str(error)) from error


def _wait(work: Work) -> None:
    try:
        work.wait(_FOREVER)
    except RuntimeError as error:
        raise GenerationAborted(str(error)) from error


def _form(store: Store, rank: int, size: int, host: str) -> Gloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = _FORMING
    group = ProcessGroupGloo(store, rank, size, options)
    group._set_default_timeout(_FOREVER)
    return group
