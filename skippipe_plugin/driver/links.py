"""The driver's ends of the control channels: requests, answers, and the first failure of any worker.

One thread per worker reads its channel. Every request has a number, which its answer names: one that comes when it was
given up is dropped and counted, and never taken for the answer to the next request. A failure (a worker's exception, a
worker that is gone) is noted once, wakes whoever waits for an answer, and calls :attr:`Links.on_failure`, which wakes
the driver out of a blocked receive.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from ..engine.channel import Channel, ChannelClosed, ChannelError
from ..engine.control.answers import Failed, NormPowers, SideGradients, Tapped, Warmed
from ..engine.control.codec import Control, Received
from ..engine.control.line import Said, to_all_workers, to_worker
from ..engine.control.presence import AskProgress, Beat, Exit, Leave, Progress, Refuse
from ..engine.device import NOWHERE, Place
from ..engine.device_errors import is_lasting
from ..engine.errors import StageLostError, unpack_exception
from ..engine.traffic import Transfer
from ..engine.waiting import Waiting
from .breaks import Breaks
from .doors import RECOVERY
from .keepers import keepers_among

log = logging.getLogger(__name__)

_A = TypeVar("_A", bound=Control)
_OfStage = TypeVar("_OfStage", Tapped, SideGradients)
_LOOK_S: Final = 0.05
_SALVAGE_S: Final = 60.0
_CAUSE_S: Final = 10.0
"""How long to wait for the cause after a rank saw only that its generation broke; on busy hosts the news is slow."""
ALL_SILENT_S: Final = 30.0
"""How much longer is waited where no worker answers: then it is rather this driver's own link that is away."""


class Link:
    """The channel to one worker. Its rank and stages are those of the pipeline that uses it at present."""

    def __init__(self, channel: Channel, pid: int | None = None, place: Place = NOWHERE) -> None:
        self.rank = -1
        self.stages: tuple[int, ...] = ()
        self.pid = pid
        """The worker's process id, when it is on this host."""
        self.place = place
        """Where the worker is, as it says."""
        self.device = ""
        """What it computes on in the pipeline that uses it; empty before that was chosen."""
        self.order = -1
        """The rank a launcher gave the worker; workers of a driver's own have none."""
        self.ticket = ""
        """What the worker's source calls it; of this host's own workers the process id."""
        self.name = ""
        """What a worker that joined by hand calls itself; the others have no name."""
        self.gone = False
        self.how_lost = "its process ended or its link broke"
        self.leaving = False
        """Whether the worker asked to be relieved of its stages."""
        self.warm = False
        """Whether an idle worker has imported what it will need."""
        self._roused_s = 0.0
        self.is_unfit = False
        """Whether its process has met an error after which it can use its device no more."""
        self._asked_s: float | None = None
        self._unanswered = 0
        self._sign = Beat()
        """The worker's last answer to a question for a sign of life."""
        self._sign_s = 0.0
        self._progress: Progress | None = None
        """What it has said to the last question for its progress."""
        self._channel = channel
        self.host, self.is_local = channel.peer.rpartition(":")[0], channel.is_local
        """The address of the worker's host, and whether this is it, as far as addresses tell."""
        self._line = to_worker(channel)
        self._board: Links | None = None
        self._answers: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self._norms: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        """Gradients' norms, which are asked for ahead: other answers are waited for, and come, before they are read."""
        self._answering = threading.Lock()
        self._last_sent = self._given_up = -1
        """The numbers of the last message that was sent, and of the last one whose answer nobody waits for any more."""
        self.num_late = 0
        """How many answers came when nobody waited for them any more."""
        self._of_stages: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        """What stages send in a step without being asked for it."""
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="worker", daemon=True)
        self._reader.start()

    def __str__(self) -> str:
        return f"worker rank {self.rank} (stage {', '.join(map(str, self.stages))})"

    def assign(self, rank: int, stages: Sequence[int], board: Links) -> None:
        """Make this the link to ``rank`` of the pipeline that ``board`` belongs to."""
        if board is not self._board:
            self.device = ""
        self.rank, self.stages, self._board = rank, tuple(stages), board

    def compute_on(self, device: str) -> None:
        """Note what the worker computes on in this pipeline."""
        self.device = device

    def set_free(self) -> None:
        """Belong to no pipeline any more."""
        self._board = None

    @property
    def round_trip_s(self) -> float:
        """The shortest round trip to the worker; 0 where that is not known."""
        return self._channel.round_trip_s

    def send(self, body: Control | Said, *, more: bool = False) -> int:
        """Send a message, and return its number; raise the first failure when the worker is gone.

        Args:
            body: What is said.
            more: Whether it may go out with the next message, which follows at once.
        """
        if self.gone:  # the kernel takes what nobody will read
            self._checked()
        number = self.tell(body, more=more)
        if number < 0:
            self._checked()
        return number

    def expect(self, kind: type[_A], to: int | None = None, is_meant: Callable[[_A], bool] | None = None) -> _A:
        """Wait for an answer of a kind; raise the first failure of any worker instead of waiting in vain.

        Args:
            kind: What it is.
            to: The number of the message that it answers; others' are late, and dropped. None: whatever comes next.
            is_meant: Tells it from others of its kind; these are dropped too.
        """
        while True:
            self._checked()
            answer = self._fitting(self._next(kind), kind, to, is_meant)
            if answer is not None:
                return answer

    def _next(self, kind: type[Control]) -> Received | None:
        assert self._board is not None, "a link that no pipeline uses"
        with self._board.waiting:
            return self._queue_of(kind).get()

    def _queue_of(self, kind: type[Control]) -> queue.SimpleQueue[Received | None]:
        if kind is NormPowers:
            return self._norms
        return self._of_stages if kind is Tapped or kind is SideGradients else self._answers

    def ask(self, question: Control, answer: type[_A]) -> _A:
        """Send a message and wait for its ``answer``, as :meth:`send` and :meth:`expect` do."""
        return self.expect(answer, self.send(question))

    def _fitting(
        self, received: Received | None, kind: type[_A], to: int | None, is_meant: Callable[[_A], bool] | None = None
    ) -> _A | None:
        """Return the answer if it is what is waited for; count it otherwise."""
        if received is None:
            return None
        body = received.body
        is_to_that = to is None or received.answers in (to, -1)
        if is_to_that and isinstance(body, kind) and (is_meant is None or is_meant(body)):
            return body
        self._note_late(received)
        return None

    def _note_late(self, received: Received) -> None:
        self.num_late += 1
        kind = type(received.body).__name__
        log.debug("%s: %r, the answer to message %d, came too late", self, kind, received.answers)

    def expect_or_lose(
        self, kind: type[_A], to: int | None = None, is_meant: Callable[[_A], bool] | None = None
    ) -> _A | None:
        """Do as :meth:`expect`, but return None when the worker is gone. Failures other than losses are raised."""
        assert self._board is not None, "a link that no pipeline uses"
        while not self.gone:
            if self._board.failed and not self._board.lost:
                self._checked()
            answer = self._fitting(self._next(kind), kind, to, is_meant)
            if answer is not None:
                return answer
        return None

    def salvage(self, question: Control, kind: type[_A]) -> _A | None:
        """Ask a survivor of a failed generation; None when it is gone, cannot know or does not answer."""
        if self.is_unfit:
            return None
        number = self.tell(question)
        deadline = time.monotonic() + _SALVAGE_S
        with contextlib.suppress(queue.Empty):
            while not self.gone and (left := deadline - time.monotonic()) > 0:
                answer = self._fitting(self._answers.get(timeout=min(left, 0.5)), kind, number)
                if answer is not None:
                    return answer
        return None

    def expect_of_stage(self, kind: type[_OfStage], step: int, microbatch: int, stage: int) -> _OfStage:
        """Wait for what a stage sends of a microbatch: for hooks to see, or gradients; others' are kept."""
        others: list[Received] = []
        while True:
            self._checked()
            received = self._next(kind)
            body = None if received is None else received.body
            if received is None or not isinstance(body, (Tapped, SideGradients)) or body.step != step:
                continue
            if isinstance(body, kind) and (body.microbatch, body.stage) == (microbatch, stage):
                for other in others:
                    self._of_stages.put(other)
                return body
            others.append(received)

    def wake(self) -> None:
        """Make a waiting :meth:`expect` look at the board."""
        for each in (self._answers, self._norms, self._of_stages):
            each.put(None)

    def forget_answers(self) -> None:
        """Drop answers to what was given up: those that are here, and those that are still to come."""
        while not self._of_stages.empty():
            self._of_stages.get()
        with self._answering:
            self._given_up = self._last_sent
            for each in (self._answers, self._norms):
                while not each.empty():
                    message = each.get()
                    if message is not None:
                        self._note_late(message)

    def tell(self, body: Control | Said, *, more: bool = False) -> int:
        """Send a message to a worker that may be gone, and return its number; -1 when it is."""
        try:
            number = self._line.send(body, more=more)
        except ChannelClosed:
            self._lost()
            return -1
        self._last_sent = max(self._last_sent, number)
        return number

    def rouse(self) -> None:
        """Ask an idle worker whether it is awake; :attr:`is_awake` tells when it has answered."""
        self._roused_s = time.monotonic()
        self.prod()

    def prod(self) -> None:
        """Ask once more: a worker that is sending something else drops a question."""
        with contextlib.suppress(ChannelClosed):  # the reader sees that too
            self._line.send_if_free(Beat())

    @property
    def is_awake(self) -> bool:
        """Whether the worker has given a sign of life since it was asked by :meth:`rouse`."""
        return not self.gone and (not self._roused_s or self._channel.heard_s >= self._roused_s)

    @property
    def num_unanswered(self) -> int:
        """How many questions of :meth:`beat` in a row were not answered."""
        return 0 if self.gone else self._unanswered

    @property
    def is_silent(self) -> bool:
        """Whether the last questions of :meth:`beat` were not answered."""
        return self.num_unanswered > 0

    def beat(self, patience: int) -> bool:
        """Ask for a sign of life; give the worker up when ``patience`` calls in a row found no answer.

        Calls are counted rather than seconds, so that a pause of this very process condemns nobody. Return whether the
        worker was given up by this call.
        """
        if self.gone:
            return False  # and why is known
        unanswered = self._asked_s is not None and self._channel.heard_s < self._asked_s
        self._unanswered = self._unanswered + 1 if unanswered else 0
        if self._unanswered >= patience:
            self.give_up("it gave no sign of life", " for too long")
            return True
        now_s = time.monotonic()  # before the question, since the answer may be here before this thread runs again
        with contextlib.suppress(ChannelClosed):  # the reader sees that too
            # Asked again each time: a worker that is sending something else drops a question.
            if self._line.send_if_free(Beat()) and not unanswered:
                self._asked_s = now_s
        return False

    def waits(self) -> int:
        """Return the turn in which the worker waits while nothing is on its way to it; 0: not that it is known."""
        is_fresh = self._asked_s is not None and self._sign_s >= self._asked_s and not self._unanswered
        return self._sign.turn if is_fresh and self._sign.is_quiet and not self.gone else 0

    def ask_progress(self, transfers: Sequence[Transfer]) -> None:
        """Ask what the worker waits for, and whether it has begun these transfers; :meth:`progress` has the answer."""
        self._progress = None
        with contextlib.suppress(ChannelClosed):  # the reader sees that too
            self._line.send_if_free(AskProgress(transfers))

    def progress(self) -> Progress | None:
        """Return, once, what the worker has said to the last question for its progress; None: nothing has come."""
        progress, self._progress = self._progress, None
        return None if self.gone else progress

    def give_up(self, how_lost: str, detail: str = "") -> None:
        """Count the worker as lost, and tell it so if it can still hear that."""
        self.how_lost = how_lost
        self._line.hang_up(Refuse(f"{how_lost}{detail} and was given up; join anew"))

    def close(self) -> None:
        """Say goodbye, close, and join the reader."""
        self._closing = True
        with contextlib.suppress(ChannelClosed):
            self._line.send(Exit())
        self._channel.close()
        self._reader.join(timeout=10)

    def _read(self) -> None:
        while True:
            try:
                received = self._line.receive()
            except ChannelError as error:
                if not isinstance(error, ChannelClosed):
                    self.how_lost = f"what it sent is no message: {error}"
                self._lost()
                return
            match received.body:
                case Beat():
                    self._sign, self._sign_s = received.body, time.monotonic()
                case Progress():
                    self._progress = received.body
                case Leave():
                    self.leaving = True
                case Warmed():
                    self.warm = True
                case _:
                    self._take(received)
            del received  # it may have all weights of a worker, and the next one may be long in coming

    def _take(self, received: Received) -> None:
        """Take what a worker answers, unless it is an answer to what was given up."""
        if isinstance(received.body, Failed) and not received.body.aborted:
            self.is_unfit = self.is_unfit or is_lasting(_error_of(received.body, self))
        with self._answering:
            board = self._board
            late = board is None or received.generation < board.generation
            if late or 0 <= received.answers <= self._given_up:
                self._note_late(received)
                return
            if not isinstance(received.body, Failed):
                self._queue_of(type(received.body)).put(received)
                return
        assert board is not None
        board.report_error(self, received.body)

    def _lost(self) -> None:
        self.gone = True
        if not self._closing and self._board is not None:
            self._board.report_lost(self)

    def _checked(self) -> None:
        assert self._board is not None, "a link that no pipeline uses"
        self._board.check()


def _error_of(failed: Failed, link: Link) -> BaseException:
    return unpack_exception(bytes(failed.exception), failed.traceback, str(link))


class Links:
    """All workers of a driver, by rank, and the first failure among them."""

    def __init__(self) -> None:
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._broken = threading.Event()
        self._named = threading.Event()
        self.generation = -1
        self.waiting = Waiting()
        """Entered while this driver waits for a worker, by whatever carries its answer."""
        self._breaks = Breaks(self.waiting, self._name_of)
        self.recovering = False
        """Whether somebody replaces lost workers: then what comes after a step goes on without them."""
        self.on_failure: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links.values())

    def __contains__(self, rank: object) -> bool:
        return rank in self._links

    def __getitem__(self, rank: int) -> Link:
        return self._links[rank]

    def __len__(self) -> int:
        return len(self._links)

    def add(self, rank: int, stages: Sequence[int], link: Link) -> None:
        """Use ``link`` as the link to ``rank``."""
        link.assign(rank, stages, self)
        self._links[rank] = link
        if link.gone:
            self.report_lost(link)

    def broadcast(self, body: Control, *, more: bool = False) -> None:
        """Send the same message to every worker; with ``more`` it may go out with the next one, which follows."""
        said = to_all_workers(body)
        for link in self._links.values():
            if self.recovering:
                link.tell(said, more=more)
            else:
                link.send(said, more=more)

    def expect_all(self, kind: type[_A], is_meant: Callable[[_A], bool] | None = None) -> dict[int, _A]:
        """Wait for one answer from every worker, by rank."""
        return {rank: link.expect(kind, None, is_meant) for rank, link in self._links.items()}

    def gather(self, kind: type[_A], is_meant: Callable[[_A], bool] | None = None) -> dict[int, _A]:
        """Wait for one answer from every worker; where lost ones are replaced, from every one that is left."""
        if not self.recovering:
            return self.expect_all(kind, is_meant)
        answers = {rank: link.expect_or_lose(kind, None, is_meant) for rank, link in self._links.items()}
        return {rank: answer for rank, answer in answers.items() if answer is not None}

    def drop_lost(self) -> list[Link]:
        """Forget the workers that are gone, and return them."""
        lost = [link for link in self._links.values() if link.gone]
        for link in lost:
            del self._links[link.rank]
            link.close()
        return lost

    def drop(self, rank: int) -> Link:
        """Forget the worker at ``rank``, and return it."""
        link = self._links.pop(rank)
        link.set_free()
        return link

    def reseat(self, workers: Mapping[int, tuple[Sequence[int], Link]]) -> list[Link]:
        """Use other workers from now on: by rank, its stages and its link; return those that are not among them."""
        links = {rank: link for rank, (_, link) in workers.items()}
        for rank, (stages, link) in workers.items():
            link.assign(rank, stages, self)
        old, self._links = list(self._links.values()), links
        for link in links.values():
            if link.gone:
                self.report_lost(link)
        parted = [link for link in old if link not in links.values()]
        for link in parted:
            link.set_free()
        return parted

    def keepers(self) -> list[Link]:
        """Return the two workers that keep a copy of what the driver itself holds; see :func:`keepers_among`."""
        return keepers_among(list(self))

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
        if not self._named.is_set() and not self._breaks.are_found:
            self._await_cause()
        failure = self._failure or self._breaks.error()
        failure.__suppress_context__ = True  # the closed connection that it was found by explains nothing
        raise failure

    def raise_cause(self, awaited: Sequence[int] = ()) -> None:
        """Raise what has broken a connection that this rank itself saw break, as it was waiting for some ranks."""
        if not self._broken.is_set():
            self._await_cause()
            if not self._broken.is_set():
                raise self._breaks.error(awaited)
        self.check()

    def _await_cause(self) -> None:
        """Wait until it is known what broke a connection; where losses are met, until all have said that they live.

        Who says nothing for so long is the cause: his host may be cut off, which this driver's own kernel would tell
        only later. Where nobody says anything it is rather this driver's link, and that is waited for.
        """
        begun_s = time.monotonic()
        links = list(self._links.values())
        for link in links:
            link.rouse()
        while not self._named.wait(_LOOK_S):
            silent = [link for link in links if not link.gone and not link.is_awake]
            waited_s = time.monotonic() - begun_s
            if waited_s > _CAUSE_S + ALL_SILENT_S or (not silent and (self.recovering or waited_s > _CAUSE_S)):
                return
            if waited_s > _CAUSE_S and len(silent) < len(links):
                for link in silent:
                    link.give_up("it gave no sign of life when a connection broke")
            for link in links:
                link.prod()

    def report_lost(self, link: Link) -> None:
        """Note that a worker is gone."""
        stage = link.stages[0] if link.stages else "of nobody"  # idle workers hold none
        self._fail(
            StageLostError(
                f"{link} is gone: {link.how_lost}, so stage {stage} is lost",
                f"Without {RECOVERY} a run cannot go on without it; start it again, training from the last checkpoint",
            )
        )

    def report_error(self, link: Link, failed: Failed) -> None:
        """Note a worker's exception; an aborted generation is only the echo of somebody else's failure."""
        if failed.aborted:
            self._breaks.note(link.rank, failed)
            self._fail(None)
        else:
            self._fail(_error_of(failed, link))

    @property
    def breaks(self) -> Breaks:
        """What is known of connections that broke in this generation."""
        return self._breaks

    def report_stall(self, generation: int) -> None:
        """Note that in this generation all wait for each other, and what they wait for is lost."""
        if generation == self.generation and not self.failed:
            self._fail(None)

    def report_dead_link(self, generation: int, sender: int, waiting: int) -> None:
        """Note that in this generation one rank waits for what another one has sent, and nothing moves."""
        if generation == self.generation and not self.failed:
            self._breaks.note_dead(sender, waiting)
            self._fail(None)

    def _name_of(self, rank: int) -> str | None:
        return str(self._links[rank]) if rank in self._links else None

    def tell_survivors(self, body: Control) -> None:
        """Send a message to every worker that is still there."""
        for link in self._links.values():
            link.tell(body)

    def start_generation(self, generation: int) -> None:
        """Forget the failure of the generation before, and its answers; a lost worker stays lost."""
        if any(link.gone for link in self._links.values()):
            self.check()
        with self._lock:
            self.generation = generation
            self._failure = None
            self._breaks = Breaks(self.waiting, self._name_of)
            self._broken.clear()
            self._named.clear()
        for link in self._links.values():
            link.forget_answers()

    def _fail(self, failure: BaseException | None) -> None:
        with self._lock:
            self._failure = self._failure or failure
            self._broken.set()
            if self._failure is not None:
                self._named.set()
        for link in list(self._links.values()):
            link.wake()
        self.on_failure()
