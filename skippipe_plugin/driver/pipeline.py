"""The driver of a pipeline: spreads the blocks, forms the groups, runs steps, gathers weights again.

It owns the links to the workers and this rank's end of the groups. Nothing here knows Lightning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from ..engine.c10d import Store
from ..engine.call import Ambient, Form, device_types
from ..engine.compilation import Compilation
from ..engine.control.answers import Done, Ready
from ..engine.control.commands import MeasureLinks
from ..engine.control.values import Opening
from ..engine.errors import GenerationAborted, SkipPipeError
from ..engine.executor import Executor
from ..engine.gradients import sum_over_holders
from ..engine.stage import Stage
from ..engine.transport import TensorSpec
from ..schedule import (
    NetworkCost,
    Schedule,
    Timeline,
)
from .accumulation import Batch
from .backward import GradientControl, mergeable
from .block_states import StateControl
from .capture.asking import CutBook
from .capture.graphs import AroundTheBlocks
from .capture.hooks import WATCHED_LATE
from .capture.notes import Noted
from .capture.proxies import BlockProxies
from .capture.stack_call import StackCall
from .capture.suspend import StepThreads, current_thread, suspend_here
from .capture.writer import CallWriter
from .clocks import WorkerClocks
from .comparing import difference_of_parts
from .devices import Devices
from .formation import Formation
from .forming import Forming
from .keeper import Keeper, settle_in
from .late_writes import note_writes
from .layout import Layout
from .links import Links
from .measured import measured_network, measured_timeline
from .mirrored import Mirror, check_hooks
from .probing import probe
from .rendezvous import Rendezvous
from .repeating import repeating
from .resizing import carried_over
from .routers import RouterControl
from .shards import ExpertShards
from .stages import StageSender
from .steps import OUTSIDE_OF_STEPS, NoFeed, StepRun, StepTask
from .structure import OwnParameters
from .tapped import TapExchange
from .unfinished import CalledTwice
from .weights import RemoteWeights
from .whole_step import WholeRun, WholeTask

TRAINING: Final = "training"
EVALUATION: Final = "evaluation"
REHEARSAL: Final = "rehearsal"
"""The forwards of a training step, which runs again when its gradients are there; used by who asks for it first."""
_T = TypeVar("_T")


def _keep() -> None:
    """Keep the schedule."""


class Pipeline:
    """A block stack spread over stages, seen from one driver.

    Args:
        layout: Which blocks and ranks make which stage.
        schedules: The schedules under the names TRAINING and EVALUATION.
        links: The control channels to the workers.
        store: The store from which the groups of every generation are formed; None: each has one of its own.
        generations: Numbers generations; shared by all pipelines that use the store one after another.
        rendezvous: The addresses the workers need.
        rank: This driver's rank.
        devices: What the processes of the run compute on.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        schedules: Mapping[str, Schedule],
        links: Links,
        store: Store | None,
        generations: Iterator[int],
        rendezvous: Rendezvous,
        rank: int,
        devices: Devices,
    ) -> None:
        self._forming = Forming(
            layout,
            schedules,
            links=links,
            store=store,
            generations=generations,
            rendezvous=rendezvous,
            rank=rank,
            devices=devices,
        )
        self.links = links
        self.device = devices.own
        self.rank = rank
        self.collect_timeline = False
        self.timeline: Timeline | None = None
        """What the last measured training step did; first driver only."""
        self.measure_next = False
        """Whether the coming training step is measured though :attr:`collect_timeline` is off."""
        self._clocks = WorkerClocks(links)
        self._step = 0
        self._threads = StepThreads()
        self._took_s: deque[float] = deque(maxlen=16)
        self._cuts = CutBook()
        self._answers: Callable[[StackCall], Tensor] | None = None
        """Takes calls that are made outside of the step functions."""
        self._make_room: Callable[[str], object] = lambda _: None
        """Lets the workers wait in no step, and is told what for."""
        self.states = StateControl()
        self._proxies: BlockProxies | None = None
        self.model: nn.Module | None = None
        """The user's, while it is loaded."""
        self._sender: StageSender | None = None
        self._hosted: dict[int, Stage] = {}
        self.keeper: Keeper | None = None
        """Replaces lost workers; without one a loss is the end of the run. Set it before :meth:`load`."""
        self.optimizer_plan: bytes | None = None
        """How workers build their part of the optimizer, as it travels."""
        self.shards = ExpertShards(self._forming)
        """Which worker holds which experts."""
        mirror = self.mirror = Mirror(self)
        """What user code sees of the blocks on workers."""
        self.remote = RemoteWeights(links, self._forming, rank, self.shards, mirror)
        self.gradients = GradientControl(links, self._forming, mirror.gradients, mirror.shared, leads=rank == 0)
        self.around = AroundTheBlocks(self.gradients.reached)
        self.in_step = self.is_announced = False
        """Whether a step is under way, and whether the workers have begun with it."""
        self.routers = RouterControl(links, leads=rank == 0)
        links.on_failure = self._forming.wake

    @property
    def leads(self) -> bool:
        """Whether this is the first driver, the one that commands the workers."""
        return self.rank == 0

    @property
    def formation(self) -> Formation:
        """Who holds what, what steps run, who is there."""
        return self._forming.formation

    @property
    def layout(self) -> Layout:
        """Which blocks and ranks make which stage."""
        return self._forming.layout

    @property
    def generation(self) -> int:
        """The number of the last generation that was begun."""
        return self._forming.formation.generation

    @property
    def is_formed(self) -> bool:
        """Whether that generation stands."""
        return self._forming.transport is not None

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """What steps run by name, around workers that are missing."""
        return self._forming.formation.schedules

    @property
    def whole_schedules(self) -> Mapping[str, Schedule]:
        """What steps run by name when no worker is missing."""
        return self._forming.programs.whole

    @property
    def microbatches(self) -> range:
        """The microbatches of the schedules that this driver may fill."""
        per_driver = self.schedules[TRAINING].num_microbatches // self.layout.num_drivers
        return range(self.rank * per_driver, (self.rank + 1) * per_driver)

    # ---------------------------------------------------------- generation

    def form(self) -> None:
        """Start a generation: form the groups anew with every worker that is there."""
        self._clocks.forget()
        self._forming.form(may_leave=self.keeper is not None, step=self._step)
        self._writer = CallWriter(self.links, self.layout)
        self.mirror.weights.forget_read()

    def abort(self) -> None:
        """Give the step under way up everywhere; the next step starts a new generation."""
        self._threads.abandon()
        if self._proxies is not None:
            self._proxies.forget_open_calls()
        self.gradients.window.discard()
        self.gradients.forget_norm()  # nobody answers any more
        self.routers.tallies.close()
        for stage in self._hosted.values():
            stage.forget()
        self._forming.give_up(counts=self.states.give_up(in_step=self.in_step))

    def close(self) -> None:
        """End the groups and the step threads; the links stay."""
        if self.keeper is not None:
            self.keeper.close()
        self._threads.close()
        self.links.on_failure = lambda: None
        self._forming.transport = None

    def go_around(self, missing: Collection[int]) -> None:
        """Let the next generation's paths avoid some ranks; none: undo it.

        Raises:
            ScheduleError: A path would have no stage left.
        """
        self._forming.go_around(missing)

    def relayout(self, layout: Layout, schedules: Mapping[str, Schedule]) -> None:
        """Let the next generation have other stages; who holds what is for the caller to see to.

        Args:
            layout: The new layout, of the same blocks.
            schedules: Its schedules, under the same names and of the same microbatches.
        """
        factors, before = self.gradients.lr_factors, self.layout.stage_blocks
        self.gradients.lr_factors = carried_over(factors, before, layout.stage_blocks)
        self._forming.relayout(layout, schedules)
        self.timeline = None

    def surviving(
        self, action: Callable[[], _T], *, rewind: Callable[[], None] = lambda: None, whole: bool = True
    ) -> _T:
        """Run ``action``, and run it again when a worker was lost under it and replaced; see :class:`Keeper`."""
        return action() if self.keeper is None else self.keeper.attempt(action, rewind, whole=whole)

    @property
    def beyond_help(self) -> bool:
        """Whether a worker is lost for good."""
        return self.links.lost and (self.keeper is None or self.keeper.gave_up)

    # --------------------------------------------------------------- model

    def load(
        self, model: nn.Module, proxies_of: Callable[..., BlockProxies], compilation: Compilation, seed: int
    ) -> None:
        """Hand the blocks over to their stages and put proxies in their places.

        Args:
            model: The whole model, proxies included afterwards; its other parameters stay on this driver.
            proxies_of: Makes the proxies, given how to probe a block and how to forward a call outside of steps.
            compilation: How the blocks are compiled.
            seed: For blocks that were built on the meta device.
        """
        proxies = proxies_of(probe=partial(probe, self), forward=self._forward)
        keep = self.keeper is not None
        self.shards.learn(proxies.blocks)
        remote = self.remote.remote_of(proxies.blocks)
        shared = self.mirror.shared
        shared.find(model, proxies.blocks, remote, proxies.names, self.device)
        self.shards.check_apart(shared.copies)
        check_hooks(remote, proxies.names, shared.copies)
        self._sender = StageSender(
            self._forming,
            proxies.blocks,
            compilation.pack(),
            seed,
            keep_structures=keep,
            shards=self.shards,
            device=self.device,
        )
        with proxies.without_hooks():
            settle_in(self.keeper, self._hand_out)
            real = proxies.install()
        self._proxies = proxies
        self._hosted = {
            stage: Stage(stage, {block: real[block] for block in self.layout.blocks(stage)}, self.device, guest=True)
            for stage in self.layout.stages_of(self.rank)
        }
        compilation.compile({block: real[block] for block in self.layout.hosted(self.rank)})
        self.remote.own(proxies.blocks, proxies.names)
        self.gradients.own(OwnParameters(model, remote.values(), self.gradients.all_optimizers).now, self._hosted)
        self.states.own(proxies.blocks, self._hosted, may_repeat=keep)
        self.model = model
        self.gradients.accumulation.host = self if keep else None
        self.routers.own(model)
        self.gradients.on_merge = self.routers.board.commit

    def _hand_out(self) -> None:
        self.heal()
        if self.leads:
            self.sender.send_all(self.links)
        self.links.expect_all(Ready)

    def unload(self) -> list[str]:
        """Bring the weights back into the driver's model and remove the proxies.

        Returns:
            The names of the blocks that could not be brought back because their worker is gone: they hold NaN.
        """
        if (proxies := self._proxies) is None:
            return []
        weights: dict[str, Tensor] = {}
        try:
            weights = self.remote.last(self)
            self.mirror.shared.check_alike(weights)
        finally:  # whatever that says, the model is whole
            lost = self.mirror.give_back(weights)
            proxies.remove()
            self._proxies = self.model = self._sender = None
            self._hosted = {}
            self.gradients.let_go()
        return [proxies.names[block] for block in lost]

    def use_schedule(self, name: str, schedule: Schedule) -> None:
        """Run the following steps by another schedule with the same placement; every driver calls this alike."""
        self._forming.use_schedule(name, schedule)

    def measure_links(self, num_bytes: int) -> NetworkCost:
        """Measure latency and bandwidth between every two ranks with messages of ``num_bytes``; all drivers call it."""
        return self.surviving(lambda: self._measure_links(num_bytes))

    def _measure_links(self, num_bytes: int) -> NetworkCost:
        self.heal()
        transport = self._forming.transport
        assert transport is not None
        try:
            if self.leads:
                self.links.broadcast(MeasureLinks(num_bytes))
            return measured_network(transport, self.links, num_bytes, self.layout.size)
        except GenerationAborted as error:
            self._give_up(error)
            raise

    @property
    def forms(self) -> Sequence[TensorSpec] | Sequence[Form]:
        """What of a microbatch crosses before each block and after the last; empty until it is known."""
        return self.proxies.forms

    def heal(self) -> None:
        """After an aborted step: a new generation, so that everybody is known to be idle and answers are fresh."""
        if self._forming.transport is None:
            self.form()

    @property
    def sender(self) -> StageSender:
        """What hands stages over."""
        assert self._sender is not None, "no model is loaded"
        return self._sender

    def hosted_stage(self, stage: int) -> Stage | None:
        """Return a stage that lives on this driver."""
        return self._hosted.get(stage)

    # --------------------------------------------------------------- steps

    def train(self, task: StepTask | WholeTask, choose: Callable[[], None] = _keep) -> tuple[list[Any], Tensor | None]:
        """Run a training step; return what the functions returned, and the loss of the batch.

        The loss is a scalar whose ``backward`` merges the step's gradients, scaled by the gradient it receives.

        Args:
            task: What to do.
            choose: Called when the first function has called the blocks (if it does) and the workers know nothing of
                the step yet: the last moment for :meth:`use_schedule`. Every driver calls it.
        """
        self.mirror.settle()
        self.gradients.begin_step()
        rewind = task.rewinder()
        with Noted(task.sizes):
            result = self.surviving(lambda: self._train(task, choose), rewind=rewind, whole=False)
        if self.keeper is not None:
            ran = Batch(task, rewind, self.schedules[TRAINING], self._ambient(), self.generation)
            self.gradients.accumulation.ran(ran)
        return result

    def _train(self, task: StepTask | WholeTask, choose: Callable[[], None]) -> tuple[list[Any], Tensor | None]:
        self.heal()
        self.gradients.accumulation.settle()
        run = self._step_run(task, self._ambient())
        with run.explained():
            self._forth_and_back(run, task, choose)
        self.gradients.window.in_half |= self.around.in_half
        self.gradients.count_visits(self.schedules[TRAINING], run.shares)
        loss = run.loss_of_batch()
        return run.values(), None if loss is None else mergeable(loss, self.gradients, task.scale, task.bends)

    def repeat(self, batch: Batch, *, keep: bool) -> None:
        """Run a training step once more for its gradients alone; ``keep`` them here and everywhere, to be merged."""
        with repeating(self, batch), Noted(batch.task.sizes):
            self._forth_and_back(self._step_run(batch.task, batch.ambient), batch.task, _keep)
        if not keep:
            self.gradients.window.drop_new()

    def _forth_and_back(self, run: StepRun | WholeRun, task: StepTask | WholeTask, choose: Callable[[], None]) -> None:
        """Run forwards and backwards of a training step; its gradients are then kept aside everywhere."""
        with run.random_state():
            if not isinstance(run, WholeRun) or (self._hosted and self.layout.num_drivers > 1):
                self.gradients.window.open()  # a function that runs once sees what is accumulated, and opens it behind
            self.in_step = True
            try:
                live = run.live(lambda: self.proxies.is_settled)
                choose()
                self.mirror.settle()  # the first function may have written weights
                self._check_unwatched(live)
                self.routers.board.open(task.scale / max(1, len(live) * self.layout.num_drivers))
                if live or self.layout.num_drivers > 1:
                    self._execute(TRAINING, run, live, task.scale)
                self.mirror.check_unwritten()
            except BaseException as error:
                self._give_up(error)
                raise
            finally:
                self.in_step = self.is_announced = False
            self.gradients.follow()
            if self.layout.num_drivers > 1:
                self.gradients.window.open()
                sum_over_holders(self.gradients.window.parameters, self._forming.sum_over_drivers)
            self.gradients.window.close()
            self.routers.board.close()

    def evaluate(
        self, task: StepTask | WholeTask, choose: Callable[[], None] = _keep, name: str = EVALUATION
    ) -> list[Any]:
        """Run functions that may call the blocks any number of times, without gradients; return their results.

        ``choose`` is called as by :meth:`train`; the schedule is that of ``name``.
        """
        self.mirror.settle(may_lend=True)
        number = self.states.new_evaluation()
        with Noted(task.sizes):
            return self.surviving(lambda: self._evaluate(task, choose, name, number), rewind=task.rewinder())

    def _evaluate(self, task: StepTask | WholeTask, choose: Callable[[], None], name: str, number: int) -> list[Any]:
        self.heal()
        self.states.evaluate(number)
        run = self._step_run(task, self._ambient())
        with run.explained():
            self._answer(run, choose, name)
        return run.values()

    def _answer(self, run: StepRun | WholeRun, choose: Callable[[], None], name: str) -> None:
        self.in_step = True
        try:
            run.start_all()
            choose()
            while self._anybody(live := run.waiting()):
                self._check_unwatched(live)
                self.mirror.settle(may_lend=True)
                self._execute(name, run, live)
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            self.in_step = self.is_announced = False

    def _check_unwatched(self, live: Sequence[int]) -> None:
        if len(live) > 1 and self.proxies.is_watched:
            raise SkipPipeError(WATCHED_LATE)

    @contextmanager
    def open_to(self, answer: Callable[[StackCall], Tensor]) -> Iterator[None]:
        """Let ``answer`` take the calls that are made outside of the step functions."""
        before, self._answers = self._answers, answer
        try:
            yield
        finally:
            self._answers = before

    def may_wait(self, make_room: Callable[[str], object] | None) -> None:
        """Note who lets the workers wait in a step between calls of this object, and ends that if it is asked to."""
        self._make_room = make_room or (lambda _: None)

    def make_room(self, why: str) -> None:
        """Let the workers wait in no step: they are to answer, and ``why`` says what that is for."""
        self._make_room(why)

    def _forward(self, call: StackCall) -> Tensor:
        """Answer a call that was made outside of the step functions, such as sampling in a callback."""
        thread = current_thread()
        if thread is not None:
            return thread.suspend(call)  # type: ignore[no-any-return]
        if self._answers is not None:
            return self._answers(call)
        if call.ambient.grad and (
            self.gradients.window.parameters or any(source.requires_grad for source in call.sources)
        ):
            raise SkipPipeError(OUTSIDE_OF_STEPS)
        self.make_room("a call of the blocks outside of steps")
        task = StepTask([lambda: suspend_here(call)], [1.0], lambda _: None, self._step, training=False)
        return self.evaluate(task)[0]  # type: ignore[no-any-return]

    def _execute(self, name: str, run: StepRun | WholeRun, live: Sequence[int], scale: float = 1.0) -> None:
        transport, programs, schedule = self._forming.transport, self._forming.programs, self.schedules[name]
        assert transport is not None
        self._step += 1
        timeline = (self.collect_timeline or self.measure_next) and name == TRAINING
        if timeline and self.leads:
            self._clocks.read()
        proxies = self.proxies
        opening = Opening(name, list(live), schedule.backward, timeline, proxies.ledger.take_freed(), scale=scale)
        if name == TRAINING:
            opening = self.gradients.opening(opening)
        opening = self.states.begin(opening, run.states, lambda: proxies.book.written_weights)
        # As many ahead of their turns as have had them: twice the hidden states on the driver, not all of them. What is
        # measured shows each embedding in its place, and what it takes.
        coming = [] if timeline else [each for each in programs.embedded[name] if each in live]
        taps = TapExchange(self._step, self.links, self.layout, self._hosted, self.device)
        run.open(self._step, schedule.paths, opening, coming, programs.most_in_flight[name], taps)
        if not live:
            run.announce()
        self.is_announced = True
        executor = Executor(transport, self._hosted, self.device, driver=run, measured=timeline)
        if name == TRAINING:
            self.routers.count(transport, schedule, live, self._hosted, self.gradients.loads.base)
        with proxies.in_step():
            events = executor.run(programs.compiled[name].of(live), NoFeed())
            done = self.links.expect_all(Done)
        transport.flush()
        if name == TRAINING:
            self.gradients.add_shared(done)
            here = self.routers.tallies.close()
            self.gradients.opened([here, *(each.loads for each in done.values())])
        self.is_announced = False
        wrote = self.states.end(training=name == TRAINING)
        note_writes(proxies, self.layout, [wrote, *(each.writes for each in done.values())], len(live))
        self.mirror.weights.outdate(buffers_only=True)
        if timeline and self.leads:
            remote = {rank: each.timeline for rank, each in done.items()}
            self.timeline = measured_timeline(schedule, events, remote, self._clocks)
        if timeline:
            self.measure_next = False

    def _ambient(self) -> Ambient:
        return Ambient.current(device_types(self.device))

    def _step_run(self, task: StepTask | WholeTask, ambient: Ambient) -> StepRun | WholeRun:
        if isinstance(task, WholeTask):
            return WholeRun(
                task,
                microbatches=self.microbatches,
                book=self._cuts,
                differs=partial(difference_of_parts, self),
                threads=self._threads,
                proxies=self.proxies,
                writer=self._writer,
                device=self.device,
                ambient=ambient,
                around=self.around,
                before_backward=self.gradients.window.open,
                shown=self.gradients.window.shown,
            )
        return StepRun(
            task,
            first=self.microbatches.start,
            threads=self._threads,
            proxies=self.proxies,
            writer=self._writer,
            device=self.device,
            ambient=ambient,
            took_s=self._took_s,
            around=self.around,
            started=self.mirror.note_started,
        )

    @property
    def proxies(self) -> BlockProxies:
        """What stands in the blocks' places in the driver's model."""
        assert self._proxies is not None, "no model is loaded"
        return self._proxies

    def _give_up(self, error: BaseException) -> None:
        """Abort the step; when it broke because of a worker, raise that worker's failure instead."""
        with self.states.counted(isinstance(error, CalledTwice) and error.unfinished is not None):
            self.abort()
        if isinstance(error, GenerationAborted):
            self.links.raise_cause(error.ranks)

    def _anybody(self, live: Sequence[int]) -> bool:
        """Whether any driver still has functions that wait for the blocks: all take part in every round."""
        if self.layout.num_drivers == 1:
            return bool(live)
        count = torch.tensor([float(len(live))])
        self._forming.sum_over_drivers(count)
        return bool(count)
