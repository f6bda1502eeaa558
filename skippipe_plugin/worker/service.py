"""The worker: holds stages, obeys its drivers' control messages, runs its part of each step.

One thread per driver reads its channel into an inbox; the main thread does everything else. A reader acts by itself
only on ``abort`` (wake a blocked main thread) and when a driver is gone (end the worker, however deep it sits).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..engine.c10d import TCPStore
from ..engine.call import Call
from ..engine.channel import Channel, ChannelClosed, Message
from ..engine.errors import GenerationAborted, SkipPipeError, pack_exception
from ..engine.executor import Executor
from ..engine.handover import pack_tensors, unpack_blocks, unpack_tensors
from ..engine.independence import Parts
from ..engine.pairs import transport_for
from ..engine.ping import measure_links
from ..engine.program import Instruction, compile_program, directed_links
from ..engine.taps import Tapped
from ..engine.transport import Transport
from ..engine.versions import own_versions
from ..engine.wire import CallDecoder, norm_answer
from ..moe.board import RouterBoard
from ..schedule import Schedule
from .holdings import Holdings
from .keep import Keep
from .order import DriversOrder
from .tallies import StageTallies

log = logging.getLogger(__name__)

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
        self._channels = [channel]
        self._outlives = outlives
        self.ends_with_driver = False
        """Whether the process is the driver's own, which has nothing left to do when that one is gone."""
        self.next_driver: Mapping[str, Any] | None = None
        """Where the next driver will be found, if this one has said so: ``host``, ``port`` and ``key`` of a store."""
        self._inbox: queue.SimpleQueue[tuple[int, Message | None]] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._transport: Transport | None = None
        self._keep = Keep()
        self._programs: dict[str, tuple[Instruction, ...]] = {}
        self._replica_groups: dict[int, str] = {}
        self._schedules: dict[str, Schedule] = {}
        self._routers = RouterBoard()
        self._tallies = StageTallies()
        self._device = torch.device("cpu")
        self._decoders: list[CallDecoder] = []
        self._calls: dict[int, list[tuple[int, Call]]] = {}
        self._sources: dict[int, int] = {}
        """By microbatch: which driver leads it."""
        self._pulled: dict[tuple[int, int], Message] = {}
        self._generation = self._rank = -1
        self._asked: tuple[int, int] = (0, -1)
        """Who sent the command under way, and its number on that one's channel."""
        self._given_up = -1
        """The last generation that the driver has given up."""
        self._step = -1
        self._steps: dict[int, Any] = {}  # Any: JSON
        self._order = DriversOrder(lambda: self._steps)
        self._later: list[Message] = []
        """What the first driver has written and the others, which have written the same, may not have yet."""
        self._closing = False
        self._may_leave = self._wants_to_leave = False
        self._refusal = ""
        self._doomsday: threading.Timer | None = None

    @property
    def _holdings(self) -> Holdings:
        return self._keep.holdings

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
                source, message = self._next()
                if message.kind in ("release", "exit"):
                    return self._farewell(message)
                self._obey(source, message)
        except DriverGone:
            self.close()
            raise

    def rejoin(self, channel: Channel) -> None:
        """Go on with another driver after the end of the last one; what is held stays."""
        self._channels, self._readers, self._inbox = [channel], [], queue.SimpleQueue()
        self._closing = False
        self._holdings.give_up_step()

    def close(self) -> None:
        """Close the channels and groups; the readers end with them."""
        self._closing = True
        if self._transport is not None:
            self._transport.poison()
            self._transport = None
        for channel in self._channels:
            channel.close()
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
            self._channels[0].send("leave", answers=-1)

    def _gone(self, source: int) -> DriverGone:
        if self._refusal:
            return Refused(f"the driver does not take this worker: {self._refusal}")
        return DriverGone(f"driver {source} is gone")

    def _farewell(self, message: Message) -> dict[str, Any] | None:
        if message.kind == "exit":
            self.close()
            return None
        results: dict[str, Any] = pickle.loads(message.blobs[0])
        return results

    def _start_reader(self, source: int) -> None:
        reader = threading.Thread(target=self._read, args=(source,), name=f"driver {source}", daemon=True)
        self._readers.append(reader)
        reader.start()

    def _read(self, source: int) -> None:
        channel = self._channels[source]
        while True:
            try:
                message = channel.receive()
            except SkipPipeError:
                if not self._closing:
                    if self.ends_with_driver and not self._refusal:
                        os._exit(1)  # whatever the main thread is at, such as an import
                    if not self._outlives:
                        self._doomsday = threading.Timer(_GRACE_S, os._exit, (1,))
                        self._doomsday.daemon = True
                        self._doomsday.start()
                    self._abort()
                    self._inbox.put((source, None))
                return
            if message.kind == "beat":
                with contextlib.suppress(ChannelClosed):
                    channel.send_if_free("beat")
                continue
            if message.kind == "refuse":
                self._refusal = message.fields["reason"]
                continue  # the end of the channel follows
            if message.kind == "abort":
                self._abort(message.fields["generation"])
            if message.kind == "exit" and source > 0:
                return  # a further driver ends before the first: nothing to do for it any more
            if message.kind == "exit":
                self._closing = True
            self._inbox.put((source, message))

    def _abort(self, generation: int | None = None) -> None:
        """Wake the main thread out of any operation of the given (or of whatever) generation."""
        if generation is not None:
            self._given_up = generation  # first: the main thread may be about to begin with it
        transport = self._transport
        if transport is not None and generation in (None, transport.generation):
            transport.poison()

    # ------------------------------------------------------------ commands

    def _obey(self, source: int, message: Message) -> None:
        if message.kind == "calls":
            self._keep_calls(source, message)
            return
        if message.kind == "abort":
            return  # the reader has done it, and the step it was for is over
        command: Callable[[int, Message], None] = getattr(self, f"_on_{message.kind}")
        outer, self._asked = self._asked, (source, message.number)
        try:
            command(source, message)
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
        fields = {"aborted": aborted, "traceback": text, "stages": list(self._holdings.stages)}
        with contextlib.suppress(ChannelClosed):  # the reader of that channel reports it
            self._answer("error", fields, [packed])

    def _answer(self, kind: str, fields: dict[str, Any], blobs: Sequence[Any] = ()) -> None:
        for source in range(len(self._channels)):
            self._reply(source, kind, fields, blobs)

    def _reply(self, source: int, kind: str, fields: dict[str, Any], blobs: Sequence[Any] = ()) -> None:
        """Answer the command under way; to another driver than the one that sent it, it is news."""
        by, number = self._asked
        answers = number if source % len(self._channels) == by else -1
        self._channels[source].send(kind, {"generation": self._generation, **fields}, blobs, answers=answers)

    def _on_configure(self, source: int, message: Message) -> None:
        fields = message.fields
        self._generation, self._rank = fields["generation"], fields["rank"]
        _extend_path(fields["sys_path"])
        self._may_leave = fields["may_leave"]
        torch.set_num_threads(fields["num_threads"])
        self._device = torch.device(fields["device"])
        for host, port in fields["other_drivers"][len(self._channels) - 1 :]:
            self._channels.append(self._channels[0].connect_to(host, port))
            self._reply(-1, "hello", {"rank": fields["rank"], "versions": own_versions()})
            self._start_reader(len(self._channels) - 1)
        self._holdings.buffers.restore()  # of a step whose gradients were not merged: it is repeated
        self._decoders = [CallDecoder(lambda tensor: tensor.to(self._device)) for _ in self._channels]
        self._calls.clear()
        self._steps.clear()
        self._order.restart(len(self._channels))
        self._form(fields)
        self._answer("ready", {})

    def _form(self, fields: Any) -> None:  # Any: JSON
        store = TCPStore(fields["store_host"], fields["store_port"], is_master=False)
        self._transport = transport_for(
            fields["backend"],
            store,
            rank=fields["rank"],
            members=fields["members"],
            generation=fields["generation"],
            host=self._channels[0].local_host,
            device=fields["device"],
        )
        if self._given_up >= self._transport.generation:  # the reader was faster, and found nothing to wake
            self._transport.poison()
        self._transport.form()
        self._replica_groups = {}
        for stage, ranks in fields["replica_groups"]:
            if fields["rank"] in ranks:
                self._replica_groups[stage] = f"stage{stage}"
                self._transport.form_subgroup(f"stage{stage}", ranks)
        self._holdings.experts.form(self._transport, fields["expert_sets"])
        self._holdings.experts.bind(self._transport, self._holdings.stages)
        schedules = {name: Schedule.from_json(text) for name, text in fields["schedules"].items()}
        self._transport.connect(directed_links(*schedules.values()))
        self._programs = {name: compile_program(schedule, self._rank) for name, schedule in schedules.items()}
        self._schedules = schedules
        self._step = fields["step"]

    def _on_load(self, source: int, message: Message) -> None:
        if message.fields["first"]:
            self._keep.forget()
        if self._holdings.load(message.fields, message.blobs, self._device):
            self._holdings.experts.bind(self._transport, self._holdings.stages)
            self._routers = RouterBoard(self._holdings.blocks().values())
            self._answer("ready", {})

    def _on_warm(self, source: int, message: Message) -> None:
        """Import what a stage will need: the blocks' classes, and what torch loads with the first optimizer."""
        _extend_path(message.fields["sys_path"])
        unpack_blocks(message.fields["blocks"], message.blobs)
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        self._reply(source, "warmed", {})

    def _on_arrange(self, source: int, message: Message) -> None:
        self._keep.arrange(message.fields, message.blobs, self._device)
        self._holdings.experts.bind(self._transport, self._holdings.stages)
        self._routers = RouterBoard(self._holdings.blocks().values())
        self._answer("ready", {})

    def _on_step(self, source: int, message: Message) -> None:
        """Note a driver's part of a step; run it when every driver has announced its own."""
        self._keep_calls(source, message)
        self._steps[source] = message.fields
        if len(self._steps) < len(self._channels):
            return
        parts, self._steps = list(self._steps.values()), {}
        self._run_step(parts[0], {microbatch for part in parts for microbatch in part["live"]}, parts)

    def _run_step(self, fields: Any, live: set[int], parts: list[Any]) -> None:  # Any: JSON
        assert self._transport is not None, "a step before the groups are formed"
        self._step = fields["step"]
        self._order.start_step()
        self._put_later()
        self._calls = {step: calls for step, calls in self._calls.items() if step >= self._step}
        for stage in self._holdings.stages.values():
            stage.forget_caches(key for part in parts for key in part["forget_caches"])
        if fields["training"]:
            self._holdings.zero(fields.get("zero", ""))
            self._holdings.begin_step(may_repeat=self._may_leave)
            self._routers.open(1 / max(1, len(live)))
            self._open_tallies(fields, live)
        self._holdings.experts.begin_step()
        self._pulled.clear()
        for stage in self._holdings.stages.values():
            stage.driver_hooks = self
        executor = Executor(self._transport, self._holdings.stages, self._device)
        events = executor.run(self._programs[fields["program"]], live, _Feed(self))
        if fields["training"]:
            self._holdings.experts.end_step(events)
            self._sum_over_replicas()
            self._holdings.window.close()
            if fields.get("repeats"):
                self._holdings.buffers.restore()  # its samples are counted
            self._routers.close()
        loads = self._tallies.close()
        timeline = [[str(event.action), event.start_s, event.end_s] for event in events] if fields["timeline"] else []
        writes = [each for stage in self._holdings.stages.values() for each in stage.take_writes()]
        self._answer("done", {"step": self._step, "timeline": timeline, "writes": writes, "loads": loads})

    def _open_tallies(self, fields: Any, live: set[int]) -> None:  # Any: JSON
        if self._routers.balances:
            assert self._transport is not None
            self._tallies.open(
                self._schedules[fields["program"]],
                live,
                self._holdings.stages,
                rank=self._rank,
                base=fields.get("loads", {}),
                post=self._transport,
            )

    def _sum_over_replicas(self) -> None:
        transport = self._transport
        assert transport is not None
        for stage, group in self._replica_groups.items():
            over_replicas = functools.partial(transport.all_reduce, name=group)
            self._holdings.experts.sum_gradients(self._holdings.stages[stage], over_replicas, transport)

    def show(self, stage: int, microbatch: int, tapped: Tapped) -> None:
        """Send what the driver's hooks are to see of a stage's forward."""
        entries, blobs = pack_tensors({str(index): tensor for index, tensor in enumerate(tapped.tensors)})
        fields = {"step": self._step, "microbatch": microbatch, "stage": stage, "tensors": entries}
        fields["requires_grad"] = list(tapped.requires_grad)
        self._reply(self._sources[microbatch], "tapped", fields, [tapped.events, *blobs])

    def gradients(self, stage: int, microbatch: int) -> dict[int, Tensor]:
        """Wait for the gradients of what the driver's hooks have seen."""
        while (microbatch, stage) not in self._pulled:
            self._take_in()
        message = self._pulled.pop((microbatch, stage))
        return {int(name): each for name, each in unpack_tensors(message.fields["tensors"], message.blobs).items()}

    def _on_pulled(self, source: int, message: Message) -> None:
        """Of a step that was given up."""

    def _on_routers(self, source: int, message: Message) -> None:
        self._answer("routers", self._routers.obey(message.fields))

    def _on_experts(self, source: int, message: Message) -> None:
        self._answer("experts", self._holdings.obey_experts(message.fields["moves"]))

    def _on_ping(self, source: int, message: Message) -> None:
        assert self._transport is not None, "links are measured in a generation"
        costs = measure_links(self._transport, message.fields["num_bytes"])
        self._answer("links", {"costs": [dataclasses.astuple(cost) for cost in costs]})

    def _on_merge(self, source: int, message: Message) -> None:
        self._put_later()
        self._routers.commit()
        self._holdings.merge(message.fields)
        if message.fields["norm_type"] is not None:
            self._on_norm(source, message)

    def _on_norm(self, source: int, message: Message) -> None:
        self._put_later()
        fields = message.fields
        powers = self._holdings.norm_powers(float(fields["norm_type"]), stepped=fields["stepped"])
        self._answer(norm_answer(message.fields["norm"]), dict(powers))

    def _on_schedule(self, source: int, message: Message) -> None:
        assert self._transport is not None, "schedules come within a generation"
        schedule = Schedule.from_json(message.fields["text"])
        self._transport.connect(directed_links(schedule))
        self._programs[message.fields["name"]] = compile_program(schedule, self._rank)
        self._schedules[message.fields["name"]] = schedule

    def _on_optimizer(self, source: int, message: Message) -> None:
        self._holdings.build_optimizer(message.blobs[0])

    def _on_optimizer_step(self, source: int, message: Message) -> None:
        self._put_later()
        self._holdings.step_optimizer(message.fields, message.blobs[0])

    def _on_optimizer_mode(self, source: int, message: Message) -> None:
        self._put_later()
        self._holdings.switch_optimizer(message.fields["method"], message.blobs[0])

    def _on_get(self, source: int, message: Message) -> None:
        self._reply(source, "state", *self._holdings.state(message.fields["what"], message.fields.get("blocks")))

    def _on_put(self, source: int, message: Message) -> None:
        if message.fields.get("quiet"):
            self._later.append(message)
            if len(self._channels) == 1:
                self._put_later()
            return
        self._holdings.put(message.fields["what"], message.fields, message.blobs)
        self._answer("ready", {})

    def _put_later(self) -> None:
        later, self._later = self._later, []
        for message in later:
            self._holdings.put(message.fields["what"], message.fields, message.blobs)

    def _on_clip(self, source: int, message: Message) -> None:
        self._put_later()
        self._holdings.zero(message.fields["zero"])
        self._holdings.clip(message.fields)

    def _on_outlive(self, source: int, message: Message) -> None:
        """Whoever joined by hand belongs to a supervised job, and waits for the next driver when this one is lost."""
        self.next_driver, self._outlives = message.fields, True

    def _on_keep(self, source: int, message: Message) -> None:
        answer = self._keep.obey(message.fields, message.blobs)
        if not message.fields.get("quiet"):
            self._reply(source, "kept", *answer)
        if self._wants_to_leave and message.fields["do"] in ("settle", "drop"):
            self._ask_to_leave()  # the driver that was asked first may be gone

    def _on_clock(self, source: int, message: Message) -> None:
        self._reply(source, "clock", {"now": time.perf_counter()})

    def _on_probe(self, source: int, message: Message) -> None:
        call: Call
        block, call, enters = pickle.loads(message.blobs[0])
        stage = next(stage for stage in self._holdings.stages.values() if block in stage.blocks)
        try:
            probe = stage.probe(block, self._here(call), enters)
        except Exception as error:
            if stage.company is not None:
                raise  # others wait in the middle of it
            packed, text = pack_exception(error)  # nothing has changed: an answer like another
            self._reply(source, "probe", {"traceback": text}, [packed])
        else:
            self._reply(source, "probe", {}, [pickle.dumps(probe)])

    def _on_parts(self, source: int, message: Message) -> None:
        block, call, enters, parts = pickle.loads(message.blobs[0])
        stage = next(stage for stage in self._holdings.stages.values() if block in stage.blocks)
        alike = stage.computes_parts_alike(block, self._here(call), enters, self._parts_here(parts))
        self._reply(source, "parts", {"alike": alike})

    # -------------------------------------------------------------- pieces

    def _here(self, call: Call) -> Call:
        return dataclasses.replace(call, side_inputs=tuple(each.to(self._device) for each in call.side_inputs))

    def _parts_here(self, parts: Parts) -> Parts:
        return dataclasses.replace(parts, calls=tuple(map(self._here, parts.calls)))

    def next_calls(self, *, block: bool) -> list[tuple[int, Call]]:
        """Return calls of the step under way: those that came, or with ``block`` at least one message's worth."""
        while not self._inbox.empty() or self._order.is_ready or (block and not self._calls.get(self._step)):
            self._take_in()
        return self._calls.pop(self._step, [])

    def _next(self) -> tuple[int, Message]:
        """Return the next message to obey, and who sent it."""
        while True:
            held = self._order.ready()
            if held is not None:
                return held
            source, message = self._inbox.get()
            if message is None:
                raise self._gone(source)
            if self._order.admit(source, message):
                return source, message

    def _take_in(self) -> None:
        """Wait for a message in the middle of a step."""
        source, message = self._next()
        if message.kind == "calls":
            self._keep_calls(source, message)
        elif message.kind == "pulled":
            self._pulled[message.fields["microbatch"], message.fields["stage"]] = message
        elif message.kind == "probe":
            self._obey(source, message)
        else:
            raise GenerationAborted(f"{message.kind!r} came in the middle of a step")

    def _keep_calls(self, source: int, message: Message) -> None:
        pairs = self._decoders[source].decode(message)
        # Another driver may be a step ahead of the first one's "step" message; aborted steps are never asked for.
        self._calls.setdefault(message.fields["step"], []).extend(pairs)
        self._sources.update((microbatch, source) for microbatch, _ in pairs)


def _extend_path(paths: Iterable[str]) -> None:
    sys.path += [path for path in paths if path not in sys.path]


class _Feed:
    """The executor's view of the worker's inbox."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def poll(self) -> list[tuple[int, Call]]:
        return self._worker.next_calls(block=False)

    def wait(self) -> list[tuple[int, Call]]:
        return self._worker.next_calls(block=True)
