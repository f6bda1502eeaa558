"""One generation of the engine's process groups: tagged, posted-ahead sends and receives of tensors.

The groups are made by hand from a store and numbered by generation; torch's *default* group is never touched. Gloo
carries the bytes; tensors of other devices go through host memory (:mod:`skippipe_plugin.engine.staging`). A send is a
rendezvous at every size, so nothing here waits for a send before :meth:`Transport.flush` at the end of a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor

from . import phases
from .c10d import Gloo, ProcessGroupGloo, Store, Work
from .device import HOST
from .errors import GenerationAborted
from .gloo_door import open_device
from .memory_order import Order, from_memory, in_memory, laid, order_of
from .own_files import OpenFile
from .rendezvous import AbortableStore
from .silence import silence_ends_after
from .staging import Staging
from .traffic import Awaited, Traffic
from .waiting import Waiting

_FORMING = timedelta(seconds=30)
_SILENT_S = 15.0
"""For how long the other end of a connection may take nothing of what was sent: its host is gone, or a cable is cut.

The control channels may tell that both ends live: then the pair, with all others, is connected anew.
"""
_CONNECT_S = 10.0
"""How long connecting may take once gloo knows where all members are; a system tries to reach one for minutes."""
_LOOK_S = 0.02
"""How often a rank that forms groups looks whether it still should."""
# Failures are found by the control channels, never by this time-out: it only has to be longer than any step.
FOREVER = timedelta(days=7)
_POISON_TAG = (1 << 31) - 1
_ALL = "all"
_NOTICE = timedelta(milliseconds=1)
_SLICE = timedelta(seconds=0.5)
"""How long a rank that waits for a collective operation waits before it looks whether it still should."""

Former = Callable[[Store, int, int], Gloo]
"""Forms a group from a store, this process's rank in it and its size."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The form of a tensor, known to both ends of a message before it is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    order: Order = ()
    """Of its dimensions in memory."""

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype, order_of(tensor))

    @property
    def num_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def in_memory(self) -> TensorSpec:
        """That of what travels: the same bytes, with the dimensions as they lie in memory."""
        return TensorSpec(tuple(self.shape[dim] for dim in self.order), self.dtype) if self.order else self

    def is_like(self, other: object) -> bool:
        """Whether tensors of both forms have the same values, wherever they lie."""
        return isinstance(other, TensorSpec) and self.shape == other.shape and self.dtype == other.dtype

    def empty(self, device: torch.device) -> Tensor:
        """Return a tensor of this form, without values."""
        form = self.in_memory
        return from_memory(torch.empty(form.shape, dtype=form.dtype, device=device), self.order)

    def zeros(self, device: torch.device) -> Tensor:
        """Return a tensor of this form, of zeros."""
        return self.empty(device).zero_()

    def random(self, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Return a tensor of this form with made-up values, of a generator of the host's if there is one.

        Whole numbers and flags are zeros, which name something wherever they are indices.
        """
        if not self.dtype.is_floating_point and not self.dtype.is_complex:
            return self.zeros(device)
        drawn = torch.randn(
            self.shape, dtype=torch.float32, device=device if generator is None else HOST, generator=generator
        )
        return laid(drawn.to(device, self.dtype), self.order)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def as_bytes(tensor: Tensor) -> Tensor:
    """View ``tensor`` as a flat uint8 tensor in host memory, copying only when it must; its order is kept."""
    data = in_memory(tensor.detach().to("cpu"), order_of(tensor))
    return data.contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor, spec: TensorSpec) -> Tensor:
    """Invert :func:`as_bytes`."""
    return from_memory(data.view(spec.dtype).reshape(spec.in_memory.shape), spec.order)


class PendingTensor:
    """A posted receive."""

    __slots__ = ("_awaited", "_buffer", "_device", "_order", "_sent", "_staging", "_waiting", "_work")

    def __init__(
        self,
        work: Work | Collective | None,
        buffer: Tensor,
        device: torch.device,
        waiting: Waiting,
        awaited: Callable[[], Awaited] | None = None,
        sent: Tensor | None = None,
        staging: Staging | None = None,
        order: Order = (),
    ) -> None:
        self._work: Work | Collective | None = work
        self._buffer, self._device, self._waiting, self._awaited = buffer, device, waiting, awaited
        self._sent = sent  # kept alive until all is here
        self._staging = staging  # which may have lent the buffer, and what was sent
        self._order = order  # of the tensor's dimensions in it

    def wait(self) -> Tensor:
        """Block until the tensor is here; raise GenerationAborted when the generation ends first."""
        self._await()
        return self._placed()

    def wait_unless(self, is_none: Callable[[Tensor], bool]) -> Tensor | None:
        """Do the same, but return None for a tensor of which that is true, where it came: a device is not asked."""
        self._await()
        if not is_none(self._buffer):
            return self._placed()
        if self._staging is not None:
            self._staging.let_go(self._buffer)
        return None

    def _placed(self) -> Tensor:
        """Return what came, where it is wanted."""
        if self._staging is not None:
            placed = self._staging.place(self._buffer)
        else:
            placed = self._buffer if self._device.type == "cpu" else self._buffer.to(self._device)
        return from_memory(placed, self._order) if self._order else placed

    def _await(self) -> None:
        work = self._work
        if work is None:
            return
        self._waiting.begin(self._awaited)
        try:
            work.wait(FOREVER)
        except RuntimeError as error:
            raise_aborted(error, () if self._awaited is None else self._awaited().ranks)
        finally:
            self._waiting.end()
        if self._staging is not None and self._sent is not None:
            self._staging.let_go(self._sent)
        self._sent = self._work = None


class Collective:
    """An operation of several ranks, which is over with its generation at the latest.

    Gloo runs it in a thread of its own, which waits until its messages are taken: for ever, if gloo has forgotten one
    (see :meth:`Transport.send`). That thread cannot be ended then, and no more can the group, which would wait for it.

    Args:
        work: The operation.
        group: Where it runs.
        aborted: Says when the generation is given up.
    """

    def __init__(self, work: Work, group: Gloo, aborted: threading.Event) -> None:
        self._work, self._group, self._aborted = work, group, aborted

    def wait(self, _: timedelta) -> None:
        """Block until it is over.

        Raises:
            RuntimeError: It failed, or the generation was given up.
        """
        while True:
            given_up = self._aborted.is_set()
            try:
                self._work.wait(_SLICE)
                return
            except RuntimeError:
                if self._work.is_completed():
                    raise
                if given_up:  # for longer than connections take to break
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
                    raise


class Transport:
    """The point-to-point links of one rank in one generation; useless until :meth:`form`.

    Args:
        store: Where the members find each other.
        rank: This rank.
        members: The ranks of this generation, in ascending order; a schedule must not visit others.
        generation: The number of the generation.
        host: The address to bind to.
        device: What this rank computes on.
        waiting: Told while this rank waits for others.
    """

    posts_ahead = True
    """Whether receives may be posted long before their messages are sent, in any order."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        members: Sequence[int],
        generation: int,
        host: str,
        device: torch.device = HOST,
        waiting: Waiting | None = None,
    ) -> None:
        self.rank = rank
        self.device = device
        self._waiting = waiting or Waiting()
        self._traffic = self._waiting.traffic = Traffic(rank, generation)
        self.members = tuple(members)
        self.generation = generation
        self._index = {member: index for index, member in enumerate(self.members)}
        self._aborted = threading.Event()
        self._aborting = threading.Lock()
        self._store: Store | None = store
        self._stores: list[AbortableStore] = []
        self._host = host
        self._groups: dict[str, Gloo] = {}
        self._company: dict[str, tuple[int, ...]] = {}
        """Who is in each subgroup."""
        self._sends: list[tuple[Work, Tensor]] = []
        self._staging: Staging | None = None
        """How tensors of this rank's device come to the host and back."""

    def form(self) -> None:
        """Connect to all members.

        Raises:
            GenerationAborted: :meth:`poison` was called meanwhile, or a member could not be reached.
        """
        phases.reach(phases.Phase.FORMING)
        self._staging = Staging.of(self.device)
        self._connect(_ALL, self.members)
        store = self._store
        assert store is not None, "who forms has a store"
        self._start(lambda: store.set(self._reached(self.rank), ""))

    def unreached(self) -> list[int]:
        """Return the members that are not connected with all others: of a link that is cut, both ends."""
        if self._store is None:
            return []
        return [rank for rank in self.members if not self._store.check([self._reached(rank)])]

    def _reached(self, rank: int) -> str:
        return f"generation/{self.generation}/reached/{rank}"

    @property
    def is_aborted(self) -> bool:
        """Whether the generation was given up, so that nothing that came in it is to be believed."""
        return self._aborted.is_set()

    def connect(self, links: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
        """Prepare directed links (source, destination), and return the new ones; every member gives the same ones."""
        return []

    def disconnect(self, links: Collection[tuple[int, int]]) -> None:
        """Give back links that :meth:`connect` has returned, none of whose messages is under way."""

    def confirm(self) -> None:
        """Make sure that what was received is what was sent, where a wait that is over does not say so.

        Raises:
            GenerationAborted: The generation was given up, and it may be anything.
        """
        if self._aborted.is_set():
            raise GenerationAborted(f"generation {self.generation} was given up")

    def leave_store(self) -> None:
        """Let go of the store: all groups of this generation are formed."""
        self._store = None
        for store in self._stores:
            store.leave()
        self._stores.clear()

    def send(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Start to send ``tensor`` as it lies in memory; it is kept alive until :meth:`flush`.

        That it was taken, the receiver has to say: gloo forgets a message whose connection breaks as it is written, and
        who waited for it would wait for ever, since nothing wakes him.
        """
        if not tensor.numel():
            return
        data = tensor.detach()
        if tensor.is_cpu:
            self._post(destination, tag, data.contiguous())
        elif self._staging is None or not self._staging.send(data, functools.partial(self._post, destination, tag)):
            self._post(destination, tag, data.to("cpu").contiguous())

    def _post(self, destination: int, tag: int, data: Tensor) -> None:
        try:
            work = self._groups[_ALL].send([data], self._index[destination], tag)
        except RuntimeError as error:
            raise_aborted(error, (destination,))
        self._sends.append((work, data))
        self._traffic.send(destination, tag)

    def receive(self, spec: TensorSpec, source: int, tag: int, device: torch.device) -> PendingTensor:
        """Post a receive for a tensor of exactly ``spec``."""
        form = spec.in_memory if spec.order else spec
        staging = None if device.type == "cpu" else self._staging
        buffer = torch.empty(form.shape, dtype=form.dtype) if staging is None else room(staging, form.shape, form.dtype)
        if not buffer.numel():
            return PendingTensor(None, buffer, device, self._waiting, order=spec.order)
        try:
            work = self._groups[_ALL].recv([buffer], self._index[source], tag)
        except RuntimeError as error:
            raise_aborted(error, (source,))
        awaited = self._traffic.receive(source, tag)
        return PendingTensor(work, buffer, device, self._waiting, awaited, None, staging, spec.order)

    def send_aside(self, tensor: Tensor, destination: int, tag: int) -> None:
        """Start to send a small host tensor that is none of the schedule's, whatever carries those."""
        group, member = self._groups[_ALL], self._index[destination]
        self._sends.append((self._start(lambda: group.send([tensor], member, tag), destination), tensor))
        self._traffic.send(destination, tag)

    def receive_aside(self, length: int, source: int, tag: int) -> PendingTensor:
        """Post a receive for what :meth:`send_aside` sends, ``length`` int64."""
        buffer = torch.empty(length, dtype=torch.int64)
        group, member = self._groups[_ALL], self._index[source]
        work = self._start(lambda: group.recv([buffer], member, tag), source)
        awaited = self._traffic.receive(source, tag)
        return PendingTensor(work, buffer, buffer.device, self._waiting, awaited)

    def end_step(self) -> None:
        """Make sure that this rank's part of a step is over, where starting an operation does not say so."""
        if self._staging is not None:
            self._staging.settle()

    def flush(self) -> None:
        """Let go of what was sent; to be called when all of it is known to be taken."""
        staging = self._staging
        try:
            if staging is not None:
                staging.settle()
        finally:
            sends, self._sends = self._sends, []
        for work, data in sends:
            try:
                work.wait(FOREVER)
            except RuntimeError as error:
                raise_aborted(error)
            if staging is not None:
                staging.let_go(data)

    def rest(self) -> None:
        """Give memory back that was kept for further steps."""
        self._staging = None

    def form_subgroup(self, name: str, ranks: Sequence[int]) -> None:
        """Form a group of ``ranks`` for :meth:`all_reduce`; every member calls this in the same order."""
        self._connect(name, ranks)
        self._company[name] = tuple(ranks)

    def all_reduce(self, tensor: Tensor, name: str) -> None:
        """Sum the host tensor ``tensor`` in place over the subgroup ``name``."""
        group = self._groups[name]
        work = Collective(self._start(lambda: group.allreduce([tensor])), group, self._aborted)
        awaited = self._traffic.meet(name, self._company[name])
        PendingTensor(work, tensor, tensor.device, self._waiting, awaited).wait()

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int], name: str) -> PendingTensor:
        """Begin to exchange rows [rows, ...] within the subgroup ``name``: by member, how many go and how many come."""
        staging, rows = None if rows.is_cpu else self._staging, rows.detach()
        fetched = None if staging is None or not rows.numel() else staging.fetch(rows)
        data = rows.to("cpu").contiguous() if fetched is None else fetched
        buffer = room(staging, (sum(receive), *rows.shape[1:]), rows.dtype)
        group = self._groups[name]
        work = self._start(lambda: group.alltoall_base(buffer, data, list(receive), list(send)))
        awaited = self._traffic.meet(name, self._company[name])
        done = Collective(work, group, self._aborted)
        return PendingTensor(done, buffer, rows.device, self._waiting, awaited, data, staging)

    def poison(self) -> None:
        """Wake every operation of this generation, from any thread; the groups are useless afterwards.

        A receive that times out makes gloo close all pairs of its group, and blocked operations raise within
        milliseconds; ``abort`` and ``shutdown`` wake nobody (pytorch#130345).
        """
        with self._aborting:  # one thread does it: gloo's own locks do not bear two
            if self._aborted.is_set():
                return
            self._aborted.set()
        for group in self._open_groups():
            self._break_off(group)

    def _open_groups(self) -> list[Gloo]:
        """Return the groups in which somebody may wait."""
        return list(self._groups.values())

    def _break_off(self, group: Gloo) -> None:
        # A receive from a peer that is gone fails at once, and closes nothing: the next one may do it.
        for peer in set(range(group.size())) - {group.rank()}:
            with contextlib.suppress(RuntimeError):
                group.recv([torch.zeros(1)], peer, _POISON_TAG).wait(_NOTICE)

    def _connect(self, name: str, ranks: Sequence[int], form: Former | None = None, attempt: int = 1) -> None:
        """Form a group in a helper thread: gloo's own connecting cannot be interrupted, and takes milliseconds."""
        assert self._store is not None, "all groups were formed"
        if self._aborted.is_set():
            raise GenerationAborted(f"generation {self.generation} was given up before it formed")
        store = AbortableStore(self._store, f"generation/{self.generation}/{name}/{attempt}/", self._aborted)
        self._stores.append(store)
        index, formed = list(ranks).index(self.rank), _Outcome()
        form = form or functools.partial(form_gloo, host=self._host, made=self._traffic.connections)
        thread = threading.Thread(
            target=formed.run,
            args=(lambda: form(store, index, len(ranks)),),
            name=f"forming generation {self.generation}",
            daemon=True,
        )
        thread.start()
        self._groups[name] = formed.wait(self._aborted, store if name == _ALL else None)
        if self._aborted.is_set():  # poison() may have come too early to see the group
            raise GenerationAborted(f"generation {self.generation} was given up while it formed")

    @staticmethod
    def _start(operation: object, *peer: int) -> Work:
        try:
            return operation()  # type: ignore[operator, no-any-return]
        except RuntimeError as error:
            raise_aborted(error, peer)


class _Outcome:
    """What a helper thread comes to, for a caller that may stop waiting."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._group: Gloo = None
        self._error: Exception | None = None

    def run(self, function: Callable[[], Gloo]) -> None:
        try:
            self._group = function()
        except Exception as error:  # whatever it is: somebody waits
            self._error = error
        self._over.set()

    def wait(self, aborted: threading.Event, store: AbortableStore | None) -> Gloo:
        while not self._over.wait(_LOOK_S):
            if store is not None and store.idle_s > _CONNECT_S:
                raise GenerationAborted(f"the members could not all be connected within {_CONNECT_S:g} s")
            if aborted.is_set():
                raise GenerationAborted("the generation was given up while it formed")
        if isinstance(self._error, (RuntimeError, OSError)):
            raise GenerationAborted(f"the groups could not be formed: {self._error}") from self._error
        if self._error is not None:
            raise self._error
        return self._group


def room(staging: Staging | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return where a tensor can be received, in memory of the staging if that has some left."""
    if staging is not None and torch.Size(shape).numel():
        lent = staging.room(shape, dtype)
        if lent is not None:
            return lent
    return torch.empty(shape, dtype=dtype)


def raise_aborted(error: RuntimeError, ranks: Sequence[int] = ()) -> NoReturn:
    """Raise what an operation's failure means: that the generation is over, unless it is one of this rank's device."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        raise error
    raise GenerationAborted(str(error), tuple(ranks)) from error


def form_gloo(store: Store, rank: int, size: int, host: str, made: set[OpenFile]) -> Gloo:
    """Form a gloo group, bound to ``host``; add its connections to those that were ``made``."""
    device, door = open_device(host)
    options = ProcessGroupGloo._Options()
    options._devices = [device]
    options._timeout = _FORMING
    with silence_ends_after(_SILENT_S) as connections:
        group = ProcessGroupGloo(store, rank, size, options)
    made |= connections
    if door is not None:
        door.shut()
    group._set_default_timeout(FOREVER)
    return group
