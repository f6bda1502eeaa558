"""The driver's ends of the control channels: requests, answers, and the first failure of any worker.

One thread per worker reads its channel. A failure (a worker's exception, a worker that is gone) is noted once, wakes
whoever waits for an answer, and calls :attr:`Links.on_failure`, which wakes the driver out of a blocked receive.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ..engine.channel import Buffer, Channel, ChannelClosed, Listener, Message
from ..engine.errors import SkipPipeError, StageLostError, unpack_exception

_JOIN_S: Final = 120.0
_CAUSE_S: Final = 2.0
"""How long to wait for the cause after a worker reported only that its generation broke."""


class Link:
    """The channel to one worker."""

    def __init__(self, rank: int, stages: Sequence[int], channel: Channel, board: Links) -> None:
        self.rank = rank
        self.stages = tuple(stages)
        self._channel = channel
        self._board = board
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._leaving = False
        self._reader = threading.Thread(target=self._read, name=f"worker {rank}", daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"worker rank {self.rank} (stage {', '.join(map(str, self.stages))})"

    def send(self, kind: str, fields: Mapping[str, Any] | None = None, blobs: Sequence[Buffer] = ()) -> None:
        """Send a message; raise the first failure when the worker is gone."""
        try:
            self._channel.send(kind, fields, blobs)
        except ChannelClosed:
            self._board.report_lost(self)
            self._board.check()

    def expect(self, kind: str) -> Message:
        """Wait for the answer ``kind``; raise the first failure of any worker instead of waiting in vain."""
        while True:
            self._board.check()
            message = self._answers.get()
            if message is not None and message.kind == kind:
                return message

    def wake(self) -> None:
        """Make a waiting :meth:`expect` look at the board."""
        self._answers.put(None)

    def forget_answers(self) -> None:
        """Drop answers to what was given up."""
        while not self._answers.empty():
            self._answers.get()

    def close(self) -> None:
        """Say goodbye, close, and join the reader."""
        self._leaving = True
        try:
            self._channel.send("exit")
        except ChannelClosed:
            pass
        self._channel.close()
        self._reader.join(timeout=10)

    def _read(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except SkipPipeError:
                if not self._leaving:
                    self._board.report_lost(self)
                return
            if message.kind == "error":
                self._board.report_error(self, message)
            else:
                self._answers.put(message)


class Links:
    """All workers of a driver, by rank, and the first failure among them."""

    def __init__(self) -> None:
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._broken = threading.Event()
        self._named = threading.Event()
        self.on_failure: Callable[[], None] = lambda: None

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._links.values())

    def __getitem__(self, rank: int) -> Link:
        return self._links[rank]

    def __len__(self) -> int:
        return len(self._links)

    def add(self, rank: int, stages: Sequence[int], channel: Channel) -> None:
        """Take over the channel to the worker that will be ``rank``."""
        self._links[rank] = Link(rank, stages, channel, self)

    def broadcast(self, kind: str, fields: Mapping[str, Any] | None = None, blobs: Sequence[Buffer] = ()) -> None:
        """Send the same message to every worker."""
        for link in self._links.values():
            link.send(kind, fields, blobs)

    def expect_all(self, kind: str) -> dict[int, Message]:
        """Wait for one answer from every worker, by rank."""
        return {rank: link.expect(kind) for rank, link in self._links.items()}

    @property
    def failed(self) -> bool:
        """Whether a worker failed or was lost in this generation."""
        return self._broken.is_set()

    @property
    def lost(self) -> bool:
        """Whether the failure is a lost worker: then there is nobody to ask any more."""
        return isinstance(self._failure, StageLostError)

    def check(self) -> None:
        """Raise the first failure, if there is one."""
        if not self._broken.is_set():
            return
        # Survivors see a closed connection before its cause is known; the cause is what the user must read.
        self._named.wait(_CAUSE_S)
        raise self._failure or SkipPipeError("the connections between the workers broke, but no worker ended")

    def report_lost(self, link: Link) -> None:
        """Note that a worker is gone."""
        self._fail(
            StageLostError(
                f"{link} is gone: its process ended or its link broke, so stage {link.stages[0]} is lost. "
                "Without the StageRecovery callback a run cannot go on without it; start again from the last checkpoint"
            )
        )

    def report_error(self, link: Link, message: Message) -> None:
        """Note a worker's exception; an aborted generation is only the echo of somebody else's failure."""
        if message.fields["aborted"]:
            self._fail(None)
        else:
            self._fail(unpack_exception(bytes(message.blobs[0]), message.fields["traceback"], str(link)))

    def clear(self) -> None:
        """Forget the failure and stale answers: a new generation starts."""
        with self._lock:
            self._failure = None
            self._broken.clear()
            self._named.clear()
        for link in self._links.values():
            link.forget_answers()

    def close(self) -> None:
        """Send everybody home."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _fail(self, failure: BaseException | None) -> None:
        with self._lock:
            self._failure = self._failure or failure
            self._broken.set()
            if self._failure is not None:
                self._named.set()
        for link in list(self._links.values()):
            link.wake()
        self.on_failure()


def accept_workers(listener: Listener, count: int, ended: Callable[[], Mapping[int, int]]) -> list[tuple[Message, Channel]]:
    """Wait until ``count`` workers joined; return their greetings and channels, in the order of joining.

    Args:
        listener: Where they join.
        count: How many to wait for.
        ended: Returns pid and exit status of worker processes that ended, to notice those that never join.

    Raises:
        SkipPipeError: A worker process ended before it joined, or nobody came in time.
    """
    joined: list[tuple[Message, Channel]] = []
    deadline = time.monotonic() + _JOIN_S
    while len(joined) < count:
        channel = listener.accept(timeout_s=0.2)
        if channel is not None:
            joined.append((channel.receive(), channel))
        elif dead := ended():
            raise SkipPipeError(f"worker processes ended before they joined (pid: exit status): {dict(dead)}")
        elif time.monotonic() > deadline:
            raise SkipPipeError(
                f"{len(joined)} of {count} workers joined {listener.host}:{listener.port} within {_JOIN_S:.0f} s; "
                "check that the other processes were started and can reach this address"
            )
    return joined
