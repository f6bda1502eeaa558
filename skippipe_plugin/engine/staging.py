"""Copies between a device and the host for messages that the host carries, beside what the device computes.

They go through pinned memory, in order, on a stream for each direction. What leaves is handed over in a thread of its
own as soon as it is here, so that the rank goes on and gives the device its next work meanwhile; where it may not (all
ranks of a group begin its operations in one order) it waits for the copy alone. Of what comes, the device waits for,
and not the rank. Pinned memory is used again and bounded; beyond that, and on kinds of devices without streams or
pinned memory, copies are those of ``Tensor.to``.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from .errors import GenerationAborted

_LIMIT_BYTES: Final = 256 << 20
"""How much pinned memory a rank takes: the system cannot use it for anything else."""


class PinnedMemory:
    """Pieces of pinned memory that are lent again and again; used by one thread at a time."""

    def __init__(self, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._limit = limit_bytes
        self.num_bytes = 0
        """How much there is, lent or not."""
        self._free: dict[int, list[Tensor]] = {}
        self._lent: dict[int, Tensor] = {}
        """By address."""
        self._due: list[tuple[torch.Event, Tensor]] = []
        """What comes back with an event."""

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a tensor of a form, without values; None if there may be no more."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._collect()
        memory = self._free[num_bytes].pop() if self._free.get(num_bytes) else self._more(num_bytes)
        if memory is None:
            return None
        self._lent[memory.data_ptr()] = memory
        return memory.view(dtype).view(shape)

    def has_lent(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in memory that is lent."""
        return tensor.data_ptr() in self._lent

    def take_back(self, tensor: Tensor, after: torch.Event | None = None) -> bool:
        """Have what was lent again, perhaps after an event; return whether it was lent."""
        memory = self._lent.pop(tensor.data_ptr(), None)
        if memory is None:
            return False
        if after is None:
            self._free.setdefault(len(memory), []).append(memory)
        else:
            self._due.append((after, memory))
        return True

    def _collect(self) -> None:
        """Take what events bring that are over: they are of one stream, in order."""
        while self._due and self._due[0][0].query():
            _, memory = self._due.pop(0)
            self._free.setdefault(len(memory), []).append(memory)

    def _more(self, num_bytes: int) -> Tensor | None:
        if self.num_bytes + num_bytes > self._limit:
            self.num_bytes -= sum(size * len(pieces) for size, pieces in self._free.items())
            self._free.clear()  # of other sizes
        if self.num_bytes + num_bytes > self._limit:
            return None
        try:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # the system has none left
            return None
        self.num_bytes += num_bytes
        return memory


class Staging:
    """The copies of one device; used by one thread at a time."""

    def __init__(self, device: torch.device, memory: PinnedMemory) -> None:
        self._device = device
        self._memory = memory
        self._leaving, self._coming = torch.Stream(device), torch.Stream(device)
        self._courier = _Courier()

    @classmethod
    def of(cls, device: torch.device) -> Staging | None:
        """Return that of a device, if its kind has streams and pinned memory."""
        if device.type == "cpu":
            return None
        with contextlib.suppress(Exception):  # each kind says in its own way what it lacks
            staging = cls(device, PinnedMemory())
            staging._try()
            return staging
        return None

    def _try(self) -> None:
        room = self.room((1,), torch.uint8)
        assert room is not None, "there is no pinned memory"
        self._leaving.wait_stream(torch.accelerator.current_stream(self._device))
        self.place(room.zero_())

    def send(self, tensor: Tensor, hand_over: Callable[[Tensor], None]) -> bool:
        """Begin to copy a tensor to the host, and hand the copy over once it is there; return whether that is done.

        What is handed over comes back with :meth:`let_go`.

        Raises:
            GenerationAborted: What was to be handed over before could not be.
        """
        begun = self._begin(tensor)
        if begun is None:
            return False
        copy, copied = begun
        self._courier.add(_Parcel(copied, tensor, copy, hand_over))
        return True

    def fetch(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of a tensor on the host, to be given back with :meth:`let_go`; None if there is no room."""
        begun = self._begin(tensor)
        if begun is None:
            return None
        copy, copied = begun
        copied.synchronize()
        return copy

    def _begin(self, tensor: Tensor) -> tuple[Tensor, torch.Event] | None:
        """Begin to copy a tensor to the host, if there is room: return the copy, and what tells that it is whole."""
        lent = self._memory.lend(tuple(tensor.shape), tensor.dtype) if tensor.device == self._device else None
        if lent is None:
            return None
        self._leaving.wait_stream(torch.accelerator.current_stream(self._device))
        with self._leaving:
            lent.copy_(tensor, non_blocking=True)
            return lent, self._leaving.record_event()

    def settle(self) -> None:
        """Wait until all is handed over.

        Raises:
            GenerationAborted: It could not be.
        """
        self._courier.settle()

    def let_go(self, tensor: Tensor) -> None:
        """Use the memory of a tensor on the host again, if it is of this object."""
        self._memory.take_back(tensor)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return where a tensor that comes can be put, for :meth:`place`."""
        return self._memory.lend(shape, dtype)

    def place(self, tensor: Tensor) -> Tensor:
        """Begin to copy to the device what has come; what the device computes from now on waits for it.

        What was not lent is copied at once.
        """
        if not self._memory.has_lent(tensor):
            return tensor.to(self._device)
        compute = torch.accelerator.current_stream(self._device)
        with self._coming:
            placed = tensor.to(self._device, non_blocking=True)
            copied = self._coming.record_event()
        compute.wait_event(copied)
        placed.record_stream(compute)
        self._memory.take_back(tensor, copied)
        return placed


@dataclass(slots=True)
class _Parcel:
    """What is on its way from the device."""

    copied: torch.Event
    source: Tensor
    """Kept until it is copied."""
    copy: Tensor
    hand_over: Callable[[Tensor], None]


@dataclass(slots=True)
class _Round:
    """What a courier and its thread share."""

    due: queue.Queue[_Parcel | None] = field(default_factory=queue.Queue)
    is_over: bool = False
    """Whether something could not be handed over, so that nothing else is."""
    failure: Exception | None = None


class _Courier:
    """Hands over what leaves the device, in order; its thread ends when this object is let go."""

    def __init__(self) -> None:
        self._round = _Round()
        self._thread: threading.Thread | None = None

    def add(self, parcel: _Parcel) -> None:
        if self._round.is_over:
            self.settle()
        if self._thread is None:
            self._thread = threading.Thread(target=_carry, args=(self._round,), name="leaving the device", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._round.due.put, None)
        self._round.due.put(parcel)

    def settle(self) -> None:
        self._round.due.join()
        failure, self._round.failure = self._round.failure, None  # with what its traceback holds
        if failure is not None:
            raise failure
        if self._round.is_over:
            raise GenerationAborted("what was to be sent before could not be")


def _carry(shared: _Round) -> None:
    while (parcel := shared.due.get()) is not None:
        try:
            if not shared.is_over:
                parcel.copied.synchronize()
                parcel.hand_over(parcel.copy)
        except Exception as error:  # whatever it is: the rank is told of it
            shared.failure, shared.is_over = error, True
        del parcel  # and not while the next one is awaited
        shared.due.task_done()
