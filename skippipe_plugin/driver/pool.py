"""The workers at a driver's disposal: where they join, and which of them are idle.

Workers outlive a pipeline: the next one, of the same or of another Trainer, takes them over. Those that nobody has
taken yet are spares. A thread lets workers in whenever they come; :meth:`WorkerPool.close` joins it.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Protocol

from ..engine.c10d import TCPStore
from ..engine.channel import Channel, ChannelError, Message
from ..engine.control.line import to_worker
from ..engine.control.messages import TO_DRIVER
from ..engine.control.presence import Hello, Refuse
from ..engine.errors import SkipPipeError
from ..engine.listener import Listener
from ..engine.versions import mismatch
from .links import Link

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.2
_AWAKE_S: Final = 2.0
"""How long idle workers may take to say that they are awake, where not enough others are."""
_PROD_S: Final = 0.1
"""After how long they are asked again: a question is dropped where somebody is sending something else."""


class EndedEarly(SkipPipeError):
    """A worker process ended before it had joined."""


class Doorkeeper(Protocol):
    """Is told what happens at the door, in its thread."""

    def greet(self, link: Link) -> None:
        """A worker has joined; it does not count as idle yet."""

    def look(self, links: Sequence[Link]) -> None:
        """These have joined and were not sent home; called several times a second."""


class WorkerPool:
    """Accepts workers on ``host:port`` and lends them to pipelines.

    Args:
        host: The address to bind to; it must be reachable for every worker.
        port: The port of the control channels; 0 for any free one.
        secret: The job's secret in hexadecimal; made when None.
        store: The store of the job, where its processes meet by one; None: a lone driver needs none.
        join_timeout_s: For how long :meth:`acquire` waits.
        door: Is told who comes and who is there; None when nobody needs to know.
    """

    def __init__(
        self,
        host: str,
        port: int = 0,
        *,
        secret: str | None = None,
        store: TCPStore | None = None,
        join_timeout_s: float = 180.0,
        door: Doorkeeper | None = None,
    ) -> None:
        self.secret = secret or secrets.token_hex(32)
        self._listener = Listener(host, port, bytes.fromhex(self.secret))
        self.store = store
        self._join_timeout_s = join_timeout_s
        self._doorkeeper = door
        self._last_failure = ""
        self.generations = itertools.count()
        self.joined: set[str] = set()
        """The tickets of the workers that ever joined; of this host's own ones the process ids."""
        self.links: list[Link] = []
        """Every worker that has joined and is there."""
        self._idle: list[Link] = []
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._door = threading.Thread(target=self._let_in, name="workers join", daemon=True)
        self._door.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where workers join."""
        return self._listener.host, self._listener.port

    @property
    def num_idle(self) -> int:
        """How many workers are here and unused."""
        return len(self.idle())

    def acquire(self, count: int, ended: Callable[[], Mapping[str, str]] = dict) -> list[Link]:
        """Return ``count`` workers, waiting for those that are still to join.

        Args:
            count: How many.
            ended: Returns the worker processes that ended, by ticket, and how, to notice those that never join.

        Raises:
            EndedEarly: A worker process ended before it joined.
            SkipPipeError: Nobody came in time.
        """
        deadline = time.monotonic() + self._join_timeout_s
        while len(self._usable()) < count:
            with self._changed:
                came = self._changed.wait(_LOOK_S)
            if not came and (dead := ended()):
                how = "; ".join(f"{ticket} ({each})" for ticket, each in dead.items())
                raise EndedEarly(f"worker processes ended before they joined: {how}")
            if time.monotonic() > deadline:
                host, port = self.address
                raise SkipPipeError(
                    f"{self.num_idle} of {count} workers joined {host}:{port} within {self._join_timeout_s:g} s; check "
                    "that the other processes were started and can reach this address"
                )
        taken = self._usable()[:count]
        self.take(taken)
        return taken

    def rouse(self, count: int) -> None:
        """Ask all idle workers whether they are awake, until ``count`` are; those that say nothing are not counted.

        A paused host, or one that was cut off, is found here instead of in the middle of a recovery.
        """
        links, asked_s = self.resting(), time.monotonic()
        deadline = asked_s + _AWAKE_S
        for link in links:
            link.rouse()
        while any(not link.is_awake for link in links) and time.monotonic() < deadline:
            if sum(link.is_awake for link in links) >= count:
                return
            if time.monotonic() - asked_s > _PROD_S:
                asked_s = time.monotonic()
                for link in links:
                    if not link.is_awake:
                        link.prod()
            time.sleep(0.001)
        asleep = sum(not link.is_awake and not link.gone for link in links)
        if asleep:
            log.warning("%d idle workers gave no sign of life within %g s; others take their place", asleep, _AWAKE_S)

    def resting(self) -> list[Link]:
        """Return the workers that are unused, whether they are awake or not."""
        with self._changed:
            return [link for link in self._idle if not link.gone and not link.is_unfit]

    def _usable(self) -> list[Link]:
        """Return who is idle; last those that a launcher holds here, though they have asked to leave."""
        ready = self.idle()
        with self._changed:
            held = [link for link in self._idle if link.leaving and link.order >= 0]
            return [*ready, *(link for link in held if link.is_awake and not link.is_unfit)]

    def take(self, links: Collection[Link]) -> None:
        """Lend these idle workers, and no others."""
        with self._changed:
            self._idle = [link for link in self._idle if link not in links]

    def release(self, links: Sequence[Link]) -> None:
        """Take workers back; those that are gone are forgotten."""
        with self._changed:
            self._idle += [link for link in links if not link.gone]

    def idle(self) -> list[Link]:
        """Return the workers that are here, awake and unused; they stay idle."""
        with self._changed:
            self._idle = [link for link in self._idle if not link.gone]
            return [link for link in self._idle if not link.leaving and not link.is_unfit and link.is_awake]

    def close(self) -> None:
        """Send every worker home and stop accepting."""
        self._closing.set()
        self._door.join()
        for link in self.links:
            link.close()
        self.links.clear()
        self._idle.clear()
        self._listener.close()

    def _let_in(self) -> None:
        while not self._closing.is_set():
            arrived = self._listener.accept(timeout_s=_LOOK_S)
            if arrived is not None:
                self._try_to_welcome(*arrived)
            self._let_out()
            self._look()

    def _look(self) -> None:
        """Let the doorkeeper look; it may ask the user's own source, and whatever that does, the door stays open."""
        if self._doorkeeper is None:
            return
        try:
            self._doorkeeper.look(self.links)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            if said != self._last_failure:
                log.warning("the source of workers does not say who is gone: %s", said)
            self._last_failure = said

    def _let_out(self) -> None:
        """Send those home that hold nothing and want to leave, or whose process is of no use.

        Ranks of a launcher stay until the end: one that ended early would end the whole job, by the launcher's rule.
        """
        with self._changed:
            going = [link for link in self._idle if (link.leaving or link.is_unfit) and link.order < 0]
            self._idle = [link for link in self._idle if link not in going]
            self.links = [link for link in self.links if link not in going and not link.gone]
        for link in going:
            link.close()

    def _understood(self, channel: Channel, greeting: Message) -> Hello | None:
        """Return what a worker says of itself; None, and refuse it, where that cannot be."""
        try:
            hello = TO_DRIVER.decode(greeting).body
        except ChannelError as error:
            reason = str(error)
        else:
            if isinstance(hello, Hello):
                differs = mismatch(hello.versions)
                if not differs:
                    return hello
                reason = f"{differs}; install the driver's versions"
            else:
                reason = f"its first message is {type(hello).__name__!r} and not 'Hello'"
        log.warning("refused a worker from %s: %s", channel.peer, reason)
        to_worker(channel).hang_up(Refuse(reason))
        return None

    def _try_to_welcome(self, channel: Channel, greeting: Message) -> None:
        """Whatever goes wrong with one, the door stays open for others."""
        try:
            self._welcome(channel, greeting)
        except Exception:
            log.exception("a worker from %s could not be let in", channel.peer)
            channel.close()

    def _welcome(self, channel: Channel, greeting: Message) -> None:
        hello = self._understood(channel, greeting)
        if hello is None:
            return
        link = Link(channel, hello.pid if channel.is_local else None, hello.place)
        link.order, link.name = hello.rank, hello.name
        link.ticket = hello.ticket or str(link.pid or "")
        if self._doorkeeper is not None:
            self._doorkeeper.greet(link)
        with self._changed:
            if link.ticket:
                self.joined.add(link.ticket)
            self.links.append(link)
            self._idle.append(link)
            self._idle.sort(key=lambda link: (link.name != "", link.order))  # first those that belong to the driver
            self._changed.notify_all()
