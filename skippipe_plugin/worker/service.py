"""The worker: holds stages, obeys its drivers' control messages, runs its part of each step.

One thread per driver reads its channel into an inbox; the main thread does everything else. A reader acts by itself
only on ``abort`` (wake a blocked main thread) and when a driver is gone (end the worker, however deep it sits).
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ..engine.call import Call
from ..engine.channel import Channel, ChannelClosed
from ..engine.control import answers, commands
from ..engine.control.codec import Control, Received
from ..engine.control.handlers import Handlers
from ..engine.control.keeping import Drop, EndRun, Settle
from ..engine.control.line import to_driver
from ..engine.control.presence import AskProgress, Beat, Exit, Hello, Leave, Outlive, Refuse, Release
from ..engine.control.values import Opening
from ..engine.device import make_current
from ..engine.errors import GenerationAborted, SkipPipeError, pack_exception
from ..engine.executor import Executor
from ..engine.handover import also_import_from, pack_tensors, unpack_blocks, unpack_tensors
from ..engine.pairs import prepare
from ..engine.taps import Tapped
from ..engine.transport import Transport
from ..engine.versions import own_versions
from ..engine.waiting import Waiting
from ..engine.wire import CallDecoder, decode_optimizer_state
from ..moe.board import RouterBoard
from .copies import Gathered
from .feed import Feed
from .holdings import Holdings
from .keep import Keep
from .membership import Membership
from .memory import give_back
from .order import DriversOrder
from .questions import compare_parts, probe
from .routers import obey
from .tallies import StageTallies

log = logging.getLogger(__name__)

_RESTS_S: Final = 0.5
"""After how long without a message a worker that holds nothing has no run to come."""
_GRACE_S: Final = 3.0
"""How long a worker whose driver is gone may take to leave by itself before it is ended."""


class DriverGone(SkipPipeError):
    """The driver closed its channel without a farewell."""


class Refused(DriverGone):
    """The driver does not take this worker (any more), and has said why."""


class Worker:
    """One worker process (or a rank > 0 of a launcher, while it serves).

    Args:
        channel: To the driver.
        outlives: Whether somebody else than the driver ends the process, and it may :meth:`rejoin`.
    """

    def __init__(self, channel: Channel, *, outlives: bool = False) -> None:
        self._lines = [to_driver(channel)]
        self._outlives = outlives
        self.ends_with_driver = False
        """Whether the process is the driver's own, which has nothing left to do when that one is gone."""
        self.next_driver: Outlive | None = None
        """Where the next driver will be found, if this one has said so."""
        self._inbox: queue.SimpleQueue[tuple[int, Received | None]] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._formed: Membership | None = None
        """Set before it forms, so that a reader can wake the main thread out of that."""
        self._keep = Keep()
        self._routers = RouterBoard()
        self._tallies = StageTallies()
        self._device = torch.device("cpu")
        self._decoders: list[CallDecoder] = []
        self._calls: dict[int, list[tuple[int, Call]]] = {}
        self._sources: dict[int, int] = {}
        """By microbatch: which driver leads it."""
        self._pulled: dict[tuple[int, int], commands.Pulled] = {}
        self._generation = -1
        self._asked: tuple[int, int] = (0, -1)
        """Who sent the command under way, and its number on that one's channel."""
        self._given_up = -1
        """The last generation that a driver has given up."""
        self._given_up_by = -1
        self._step = -1
        self._steps: dict[int, commands.Step] = {}
        self._order = DriversOrder(lambda: self._steps)
        self._later: list[commands.Overwrite | commands.Share] = []
        """What the first driver has written and the others, which have written the same, may not have yet."""
        self._over_for: set[int] = set()
        """The drivers for which the run is over."""
        self._owes_memory = False
        """Whether what a run took is to be given back to the host."""
        self._closing = False
        self._may_leave = self._wants_to_leave = False
        self._refusal = ""
        self._doomsday: threading.Timer | None = None
        self._waiting = Waiting()
        self._handlers = self._table()

    def _table(self) -> Handlers:
        handlers = Handlers()
        handlers.on(commands.Configure, self._configure)
        handlers.on(commands.Abort, lambda c: self._holdings.states.settle(counts=c.counts))  # the reader did the rest
        handlers.on(commands.Load, self._load)
        handlers.on(commands.Warm, self._warm)
        handlers.on(commands.Arrange, self._arrange)
        handlers.on(commands.Step, self._begin_step)
        handlers.on(commands.Pulled, lambda _: None)  # of a step that was given up
        handlers.on(commands.AskRouters, self._ask_routers)
        handlers.on(commands.MoveExperts, self._move_experts)
        handlers.on(commands.MeasureLinks, lambda c: self._answer(self._membership.measure_links(c.num_bytes)))
        handlers.on(commands.Merge, self._merge)
        handlers.on(commands.AskNorm, self._measure_norm)
        handlers.on(commands.Unscale, self._unscale)
        handlers.on(commands.UseSchedule, lambda c: self._membership.use_schedule(c.name, c.text))
        handlers.on(commands.BuildOptimizer, lambda command: self._holdings.build_optimizer(command.plan))
        handlers.on(commands.PutOptimizerState, self._put_optimizer_state)
        handlers.on(commands.StepOptimizer, self._step_optimizer)
        handlers.on(commands.SwitchOptimizer, self._switch_optimizer)
        handlers.on(commands.Get, self._get)
        handlers.on(commands.Overwrite, self._overwrite)
        handlers.on(commands.Share, self._overwrite)
        handlers.on(commands.Clip, self._clip)
        handlers.on(commands.AskClock, lambda _: answers.ClockReads(time.perf_counter()))
        handlers.on(commands.Probe, lambda c: probe(self._holdings, c, self._device))
        handlers.on(commands.CompareParts, lambda c: compare_parts(self._holdings, c, self._device))
        handlers.on(EndRun, self._end_run)
        handlers.on(Drop, lambda _: self._drop())
        self._keep.add_to(handlers)
        return handlers

    @property
    def _holdings(self) -> Holdings:
        return self._keep.holdings

    @property
    def _membership(self) -> Membership:
        assert self._formed is not None, "this comes within a generation"
        return self._formed

    @property
    def _transport(self) -> Transport | None:
        formed = self._formed
        return None if formed is None else formed.transport

    # ---------------------------------------------------------------- life

    def serve(self) -> dict[str, Any] | None:
        """Obey until released; return the driver's farewell, or None when told to exit.

        Raises:
            DriverGone: The driver's process ended or its link broke.
        """
        if not self._readers:
            self._start_reader(0)
        try:
            while True:
                source, received = self._next()
                match received.body:
                    case Exit():
                        self.close()
                        return None
                    case Release(results):
                        farewell: dict[str, Any] = pickle.loads(results)
                        return farewell
                self._obey(source, received)
                del received  # or what it had would stay until the next one is here
        except DriverGone:
            self.close()
            raise

    def rejoin(self, channel: Channel) -> None:
        """Go on with another driver after the end of the last one; what is held stays."""
        self._lines, self._readers, self._inbox = [to_driver(channel)], [], queue.SimpleQueue()
        self._closing = False
        self._holdings.give_up_step(for_good=True)

    def close(self) -> None:
        """Close the channels and groups; the readers end with them."""
        self._closing = True
        if self._formed is not None:
            self._formed.transport.poison()
            self._formed = None
        for line in self._lines:
            line.channel.close()
        for reader in self._readers:
            reader.join(timeout=_GRACE_S)
        if self._doomsday is not None:
            self._doomsday.cancel()

    def leave(self) -> bool:
        """Ask to be relieved of the stages at the end of the step; False when nobody would take them over."""
        if self._may_leave:
            self._wants_to_leave = True
            # In a thread: this may be called from a signal handler, in the middle of a message.
            threading.Thread(target=self._ask_to_leave, name="leaving", daemon=True).start()
        return self._may_leave

    def _ask_to_leave(self) -> None:
        with contextlib.suppress(ChannelClosed):
            self._lines[0].send(Leave(), answers=-1)

    def _gone(self, source: int) -> DriverGone:
        if self._refusal:
            return Refused(f"the driver does not take this worker: {self._refusal}")
        return DriverGone(f"driver {source} is gone")

    def _start_reader(self, source: int) -> None:
        reader = threading.Thread(target=self._read, args=(source,), name=f"driver {source}", daemon=True)
        self._readers.append(reader)
        reader.start()

    def _read(self, source: int) -> None:
        line = self._lines[source]
        while True:
            try:
                received = line.receive()
            except SkipPipeError as error:
                if not self._closing:
                    if not isinstance(error, ChannelClosed):
                        log.error("the link to driver %d ends: %s", source, error)
                    self._lose_driver(source)
                return
            match received.body:
                case Beat():
                    with contextlib.suppress(ChannelClosed):
                        line.send_if_free(Beat(self._waiting.turn, self._waiting.is_quiet()))
                    continue
                case AskProgress(transfers):
                    with contextlib.suppress(ChannelClosed):
                        line.send_if_free(self._waiting.progress(transfers))
                    continue
                case Outlive() as where:  # it joined by hand; this may come in the middle of a step
                    self.next_driver, self._outlives = where, True
                    continue
                case Refuse(reason):
                    self._refusal = reason
                    continue  # the end of the channel follows
                case commands.Abort(generation, _):
                    self._given_up_by = source
                    self._abort(generation)
                case Exit() if source > 0:
                    return  # a further driver ends before the first: nothing to do for it any more
                case Exit():
                    self._closing = True
            self._inbox.put((source, received))
            del received  # it may have a stage's weights, and the next one may be long in coming

    def _lose_driver(self, source: int) -> None:
        if self.ends_with_driver and not self._refusal:
            os._exit(1)  # whatever the main thread is at, such as an import
        if not self._outlives:
            self._doomsday = threading.Timer(_GRACE_S, os._exit, (1,))
            self._doomsday.daemon = True
            self._doomsday.start()
        self._abort()
        self._inbox.put((source, None))

    def _abort(self, generation: int | None = None) -> None:
        """Wake the main thread out of any operation of the given (or of whatever) generation."""
        if generation is not None:
            self._given_up = generation  # first: the main thread may be about to begin with it
        transport = self._transport
        if transport is not None and generation in (None, transport.generation):
            transport.poison()

    # ------------------------------------------------------------ commands

    def _obey(self, source: int, received: Received) -> None:
        if isinstance(received.body, commands.Calls):
            self._keep_calls(source, received.body)
            return
        outer, self._asked = self._asked, (source, received.number)
        try:
            answer = self._handlers.obey(received.body)
            if answer is not None:
                self._reply(source, answer)
            if self._wants_to_leave and isinstance(received.body, (Settle, Drop)):
                self._ask_to_leave()  # the driver that was asked first may be gone
        except DriverGone:
            raise
        except ChannelClosed:
            pass  # the reader of that channel reports it
        except GenerationAborted as error:
            self._report(error, aborted=True)
        except Exception as error:
            self._report(error, aborted=False)
        finally:
            self._asked = outer

    def _report(self, error: BaseException, *, aborted: bool) -> None:
        self._holdings.give_up_step()
        self._tallies.close()
        packed, text = pack_exception(error)
        awaited, by = -1, -1
        if isinstance(error, GenerationAborted):
            if self._given_up >= self._generation:
                by = self._given_up_by
            elif self._transport is not None and not self._transport.is_aborted:
                awaited = next(iter(error.ranks), -1)
        with contextlib.suppress(ChannelClosed):  # the reader of that channel reports it
            self._answer(answers.Failed(aborted, text, awaited, by, packed))

    def _answer(self, body: Control) -> None:
        """Answer the command under way such that all drivers know."""
        for source in range(len(self._lines)):
            self._reply(source, body)

    def _reply(self, source: int, body: Control) -> None:
        """Answer the command under way; to another driver than the one that sent it, it is news."""
        by, number = self._asked
        answers = number if source % len(self._lines) == by else -1
        self._lines[source].send(body, answers=answers, generation=self._generation)

    def _configure(self, command: commands.Configure) -> None:
        self._generation = command.generation
        also_import_from(command.sys_path)
        self._may_leave = command.may_leave
        torch.set_num_threads(command.num_threads)
        self._device = torch.device(command.device)
        prepare(command.backend)
        make_current(self._device)
        for host, port in command.other_drivers[len(self._lines) - 1 :]:
            self._lines.append(to_driver(self._lines[0].channel.connect_to(host, port)))
            self._reply(-1, Hello(own_versions(), rank=command.rank))
            self._start_reader(len(self._lines) - 1)
        self._holdings.states.settle(counts=False)  # of a step whose gradients were not merged: it is repeated
        self._new_decoders()
        self._calls.clear()
        self._steps.clear()
        self._over_for.clear()
        self._owes_memory = False  # what is to come would wait for it
        self._order.restart(len(self._lines))
        self._form(command)
        self._answer(answers.Ready())

    def _form(self, command: commands.Configure) -> None:
        self._formed = membership = Membership(command, self._lines[0].channel.local_host, self._waiting)
        if self._given_up >= command.generation:  # the reader was faster, and found nothing to wake
            membership.transport.poison()
        membership.form(self._holdings.experts, self._holdings.stages)
        self._step = command.step

    def _load(self, command: commands.Load) -> None:
        if command.first:
            self._keep.forget()
        self._holdings.load(command, self._device)
        if command.last:
            self._settle_in()

    def _warm(self, command: commands.Warm) -> answers.Warmed:
        """Import what a stage will need: the blocks' classes, and what torch loads with the first optimizer."""
        also_import_from(command.sys_path)
        unpack_blocks(command.blocks, command.blobs)
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        return answers.Warmed()

    def _arrange(self, command: commands.Arrange) -> None:
        self._keep.arrange(command, self._device)
        self._settle_in()

    def _settle_in(self) -> None:
        """Everything has come."""
        self._holdings.experts.bind(self._transport, self._holdings.stages)
        self._routers = RouterBoard(self._holdings.blocks().values())
        self._answer(answers.Ready())

    def _end_run(self, command: EndRun) -> None:
        """Hold nothing any more, once no driver asks for it."""
        if command.generation != self._generation:
            return  # the next run has begun
        self._over_for.add(self._asked[0])
        if len(self._over_for) == len(self._lines):
            self._drop()

    def _drop(self) -> None:
        """Hold nothing any more; the memory is given back when this worker rests."""
        self._keep.drop()
        self._routers, self._later = RouterBoard(), []
        self._calls.clear()
        self._pulled.clear()
        self._new_decoders()
        with contextlib.suppress(GenerationAborted):  # of a step that failed
            self._let_go()
        if self._transport is not None:
            self._transport.rest()
        self._owes_memory = True

    def _new_decoders(self) -> None:
        self._decoders = [CallDecoder(lambda tensor: tensor.to(self._device)) for _ in self._lines]

    def _begin_step(self, command: commands.Step) -> None:
        """Note a driver's part of a step; run it when every driver has announced its own."""
        source, _ = self._asked
        self._keep_calls(source, command)
        self._steps[source] = command
        if len(self._steps) < len(self._lines):
            return
        parts, self._steps = list(self._steps.values()), {}
        openings = [part.opening for part in parts]
        live = {microbatch for opening in openings for microbatch in opening.live}
        self._run_step(parts[0].news.step, openings, live)

    def _run_step(self, number: int, openings: list[Opening], live: set[int]) -> None:
        membership, holdings = self._membership, self._holdings
        self._step, first = number, openings[0]
        self._let_go()
        self._order.start_step()
        self._put_later()
        self._calls = {step: calls for step, calls in self._calls.items() if step >= self._step}
        for stage in holdings.stages.values():
            stage.forget_caches(key for opening in openings for key in opening.forget_caches)
        holdings.begin_step(first, may_repeat=self._may_leave)
        if first.training:
            self._routers.open(first.scale / max(1, len(live)))
            self._open_tallies(first, live)
        gathered = Gathered()
        holdings.experts.begin_step()
        self._pulled.clear()
        for stage in holdings.stages.values():
            stage.driver_side = self
        timed, measured = holdings.experts.wants_times, first.timeline
        executor = Executor(membership.transport, holdings.stages, self._device, timed=timed, measured=measured)
        events = executor.run(membership.plan(first.program, live), Feed(self))
        if first.training:
            holdings.experts.end_step(events)
            membership.sum_over_replicas(holdings.experts, holdings.stages)
            gathered = holdings.end_step(membership.followed)
            self._routers.close()
        writes = holdings.states.end()
        loads = self._tallies.close()
        timeline = [(str(event.action), event.start_s, event.end_s) for event in events] if first.timeline else []
        done = answers.Done(self._step, timeline, writes, loads)
        for source in range(len(self._lines)):
            self._reply(source, done if source else gathered.added_to(done))

    def _open_tallies(self, opening: Opening, live: set[int]) -> None:
        if self._routers.balances:
            membership = self._membership
            self._tallies.open(
                membership.schedule(opening.program),
                live,
                self._holdings.stages,
                rank=membership.rank,
                base=opening.loads,
                post=membership.transport,
            )

    def show(self, stage: int, microbatch: int, tapped: Tapped) -> None:
        """Send what the driver's hooks are to see of a stage's forward."""
        entries, blobs = pack_tensors({str(index): tensor for index, tensor in enumerate(tapped.tensors)})
        flags = list(tapped.requires_grad)
        seen = answers.Tapped(self._step, microbatch, stage, entries, flags, tapped.events, blobs)
        self._reply(self._sources[microbatch], seen)

    def gradients(self, stage: int, microbatch: int) -> dict[int, Tensor]:
        """Wait for the gradients of what the driver's hooks have seen."""
        while (microbatch, stage) not in self._pulled:
            self._take_in()
        pulled = self._pulled.pop((microbatch, stage))
        return {int(name): each for name, each in unpack_tensors(pulled.tensors, pulled.blobs).items()}

    def send_gradients(self, stage: int, microbatch: int, gradients: Mapping[int, Tensor]) -> None:
        """Send the gradients of a stage's side inputs to the driver that they come from."""
        entries, blobs = pack_tensors({str(slot): gradient for slot, gradient in gradients.items()})
        self._reply(self._sources[microbatch], answers.SideGradients(self._step, microbatch, stage, entries, blobs))

    def _ask_routers(self, command: commands.AskRouters) -> None:
        self._answer(obey(self._routers, command))

    def _move_experts(self, command: commands.MoveExperts) -> None:
        self._answer(answers.ExpertNews(self._holdings.move_experts(command.moves)))

    def _merge(self, command: commands.Merge) -> None:
        self._let_go()
        self._put_later()
        self._routers.commit()
        self._holdings.merge(command)
        if command.norm is not None:
            self._measure_norm(command.norm)

    def _measure_norm(self, command: commands.AskNorm) -> None:
        self._put_later()
        powers = self._holdings.norm_powers(float(command.norm_type), stepped=command.stepped)
        self._answer(answers.NormPowers(command.number, *powers))

    def _unscale(self, command: commands.Unscale) -> None:
        self._put_later()
        self._answer(answers.Unscaled(command.number, self._holdings.unscale(command.inverse)))
        if command.norm is not None:
            self._measure_norm(command.norm)

    def _put_optimizer_state(self, command: commands.PutOptimizerState) -> None:
        self._holdings.load_optimizer_state(decode_optimizer_state(command.tensors, command.blobs))
        self._answer(answers.Ready())

    def _step_optimizer(self, command: commands.StepOptimizer) -> None:
        self._put_later()
        self._holdings.step_optimizer(command.order, command.settings)

    def _switch_optimizer(self, command: commands.SwitchOptimizer) -> None:
        self._put_later()
        self._holdings.switch_optimizer(command.method, command.settings)

    def _get(self, question: commands.Get) -> answers.State:
        return self._holdings.state(question.what, question.blocks)

    def _overwrite(self, command: commands.Overwrite | commands.Share) -> None:
        self._later.append(command)
        if len(self._lines) == 1:
            self._put_later()

    def _let_go(self) -> None:
        """Free what was sent in the last step: the driver goes on, so all others have taken it."""
        if self._transport is not None:
            self._transport.flush()

    def _put_later(self) -> None:
        later, self._later = self._later, []
        for command in later:
            self._holdings.overwrite(command)

    def _clip(self, command: commands.Clip) -> None:
        self._put_later()
        self._holdings.zero(command.zero)
        self._holdings.clip(command)

    # -------------------------------------------------------------- pieces

    def next_calls(self, *, block: bool) -> list[tuple[int, Call]]:
        """Return calls of the step under way: those that came, or with ``block`` at least one message's worth."""
        while not self._inbox.empty() or self._order.is_ready or (block and not self._calls.get(self._step)):
            self._take_in()
        return self._calls.pop(self._step, [])

    def _next(self) -> tuple[int, Received]:
        """Return the next message to obey, and who sent it."""
        while True:
            held = self._order.ready()
            if held is not None:
                return held
            with self._waiting:
                source, received = self._arrival()
            if received is None:
                raise self._gone(source)
            if self._order.admit(source, received):
                return source, received

    def _arrival(self) -> tuple[int, Received | None]:
        """Wait for what comes next; give memory back once nothing has come for a while after a run.

        It takes as long as many steps, and the next run often begins at once.
        """
        if self._owes_memory:
            with contextlib.suppress(queue.Empty):
                return self._inbox.get(timeout=_RESTS_S)
            self._owes_memory = False
            give_back(self._device)
        return self._inbox.get()

    def _take_in(self) -> None:
        """Wait for a message in the middle of a step."""
        source, received = self._next()
        match received.body:
            case commands.Calls():
                self._keep_calls(source, received.body)
            case commands.Pulled(_, microbatch, stage):
                self._pulled[microbatch, stage] = received.body
            case commands.Probe():
                self._obey(source, received)
            case commands.Abort(_, counts):
                self._holdings.states.settle(counts=counts)
                raise GenerationAborted("the step was given up")
            case other:
                raise GenerationAborted(f"{type(other).__name__!r} came in the middle of a step")

    def _keep_calls(self, source: int, command: commands.Calls | commands.Step) -> None:
        pairs = self._decoders[source].decode(command.news, command.blobs)
        # Another driver may be a step ahead of the first one's step; aborted steps are never asked for.
        self._calls.setdefault(command.news.step, []).extend(pairs)
        self._sources |= dict.fromkeys([microbatch for microbatch, _ in pairs], source)
