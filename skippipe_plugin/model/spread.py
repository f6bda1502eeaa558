"""A model whose blocks are spread over workers: cut, handed over, stepped along planned paths, brought back."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..driver.capture.devices import move_around
from ..driver.capture.proxies import BlockProxies
from ..driver.capture.twins import in_common
from ..driver.devices import Devices
from ..driver.experts import ExpertMover
from ..driver.keeper import settle_in
from ..driver.layout import Layout
from ..driver.links import Links
from ..driver.moving import MoveEvent, Mover
from ..driver.pipeline import EVALUATION, REHEARSAL, TRAINING, Pipeline
from ..driver.recovery.heartbeat import Heartbeat
from ..driver.recovery.policy import RecoveryPolicy
from ..driver.recovery.report import RecoveryEvent
from ..driver.recovery.stage_keeper import StageKeeper
from ..driver.shards import Site
from ..driver.steps import StepTask
from ..driver.whole_step import WholeTask
from ..engine import phases
from ..engine.compilation import Compilation
from ..engine.control.keeping import EndRun
from ..engine.control.values import States
from ..engine.device import for_gloo
from ..engine.errors import SkipPipeError
from ..job.job import DriverJob
from ..moe import Attached, RouterStatistics, attach, find_routers
from ..moe.migration import Move
from ..moe.spent import BlockSize, block_size, spent_share
from ..partition import cut, driver_share, estimate_costs, other_stacks
from ..schedule import CostModel, Schedule, Timeline, fit_costs, forward_only, gpipe, swap_ends
from ..sharing import check_hidden_references
from .elastic import ElasticShapes, check_elastic
from .interrupts import interrupts_follow
from .padding import keep_padding_empty
from .settings import PipelineSettings
from .skipping import PathPlanner

log = logging.getLogger(__name__)

_SILENT_S: Final = 60.0
"""For how long a worker may give no sign of life before a run ends that replaces nobody: it is paused or hung."""
Recovery = tuple[RecoveryPolicy, Callable[[RecoveryEvent | MoveEvent], None]]
"""How losses are met, and who is told of them."""


class SpreadModel:
    """One model's blocks on workers, from :meth:`spread` until :meth:`bring_back`.

    Args:
        settings: The user's.
        num_stages: How many block stages to make.
        job: Where workers come from.
        rank: This driver's rank.
        devices: What the processes of the run compute on.
        broadcast: Gives every driver what the first one has.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        *,
        num_stages: int,
        job: DriverJob,
        rank: int,
        devices: Devices,
        broadcast: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        self.settings = settings
        self.attached: Attached | None = None
        """What listens to the routers of experts."""
        self.planner: PathPlanner | None = None
        """What plans the paths of training steps; None with a schedule of the user's own."""
        self.links = Links()
        self.remote_blocks: tuple[nn.Module, ...] = ()
        self._num_stages = num_stages
        self._job = job
        self._rank = rank
        self._devices = devices
        self._device = devices.own
        self._broadcast = broadcast
        self._pipeline: Pipeline | None = None
        self._evaluation_planner: PathPlanner | None = None
        self._block_names: tuple[str, ...] = ()
        self._advised = False
        self._chosen_for: object = None
        """The batch whose calls of the blocks have their paths."""
        self._usual: tuple[Schedule, Schedule] | None = None
        """While losses come last: the schedule for that, and the one in whose place it is."""
        self._mover: ExpertMover | None = None
        self._heartbeat: Heartbeat | None = None
        """Of runs that replace nobody; others have one that does."""
        self._undo: list[Callable[[], None]] = []
        self._wakes: Callable[[], object] = lambda: None
        """Ends a rest between runs."""
        self._sizes: Sequence[BlockSize] = ()

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that runs.

        Raises:
            SkipPipeError: There is none yet, or none any more.
        """
        if self._pipeline is None:
            raise SkipPipeError(
                "the pipeline is not set up: call this from inside fit, validate, test or predict (in a loop of your "
                "own: after accelerator.prepare, or inside of TorchPipeline)"
            )
        return self._pipeline

    @property
    def is_spread(self) -> bool:
        """Whether the blocks are on their workers, or on their way."""
        return self._pipeline is not None

    @property
    def worker_pids(self) -> dict[int, int]:
        """By rank: the process ids of the workers on this host."""
        return {link.rank: link.pid for link in self.links if link.pid is not None}

    def device_of(self, rank: int) -> str:
        """Name the device that a rank computes on; the first driver knows those of its workers."""
        return self.links[rank].device if rank in self.links else str(self._device)

    # ------------------------------------------------------- spread and bring back

    def spread(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        compilation: Compilation,
        recovery: Recovery | None = None,
        move: Callable[[], None] | None = None,
    ) -> None:
        """Cut the block stack into stages and hand them over to workers.

        Args:
            model: The whole model; what is not in ``blocks`` stays here.
            blocks: The block stack.
            compilation: How the blocks are compiled.
            recovery: How lost workers are replaced; None when they are not.
            move: Moves to the driver's device what stays; by default all that is not in :attr:`remote_blocks`.
        """
        check_hidden_references(model, _names_in(model, blocks), blocks)
        layout = self.settings.shape.layout(self._cut(model, blocks))
        others = other_stacks(model, blocks)
        hosted = set(layout.hosted(self._rank))
        if self.settings.moe is not None:
            _check_routers_apart(model, blocks)
            self.attached = attach(model, self.settings.moe)
        self.remote_blocks = tuple(block for index, block in enumerate(blocks) if index not in hosted)
        if move is None:
            move_around(model, set(self.remote_blocks), self._device)
        else:
            move()
        if self.settings.drivers > 1:
            _start_alike(model)
        pipeline = self._pipeline = self._make_pipeline(layout)
        pipeline.gradients.scale = self.settings.gradient_scale
        if self.settings.moe is not None:
            pipeline.shards.overlap = self.settings.moe.overlap
        if recovery is not None:
            self._keep_whole(pipeline, blocks, *recovery)
        else:
            self._heartbeat = Heartbeat(self.links, _SILENT_S, is_only_driver=self.settings.drivers == 1)
        self._plan_paths(pipeline.schedules[TRAINING])
        settle_in(pipeline.keeper, pipeline.heal)
        self._block_names = _names_in(model, blocks)
        if self.attached is not None:
            self._sizes = [block_size(block, name) for block, name in zip(blocks, self._block_names, strict=True)]
        self._undo = keep_padding_empty(model, blocks)
        pipeline.load(
            model,
            functools.partial(BlockProxies, self._block_names, blocks, self._device, other_stacks=others),
            compilation,
            seed=torch.initial_seed() & 0x7FFFFFFF,
        )

    def rest(self) -> None:
        """Stay as it is until another run; once nobody can begin one any more, the workers are free."""
        keeper = self.pipeline.keeper
        heartbeat = self._heartbeat if keeper is None else keeper.heartbeat
        self._wakes = self._job.free_when_deserted(self, functools.partial(_free, self._job, self.links, heartbeat))

    def wake(self) -> None:
        """Go on after a :meth:`rest`."""
        self._wakes()

    def bring_back(self, *, keep: bool = False) -> None:
        """Make the model whole again on this driver, and free the workers.

        Args:
            keep: Whether they go on holding what they hold: a driver that is started again may need it.
        """
        with interrupts_follow():
            self._bring_back(keep=keep)

    def _bring_back(self, *, keep: bool) -> None:
        self.wake()
        pipeline, self._pipeline = self._pipeline, None
        try:
            if pipeline is not None:
                _warn_lost(pipeline.unload())
        finally:
            heartbeat, self._heartbeat = self._heartbeat, None
            if heartbeat is not None:
                heartbeat.close()
            if pipeline is not None:
                pipeline.close()
                if not keep:
                    self.links.tell_survivors(EndRun(pipeline.generation))
            self._job.release(list(self.links))
            self.links = Links()
            self._mover = None
            self.remote_blocks = ()
            while self._undo:
                self._undo.pop()()
            if self.attached is not None:
                self.attached.detach()
                self.attached = None
            phases.reach(phases.Phase.BETWEEN)

    def _cut(self, model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[range, ...]:
        share = driver_share(model, blocks, self._num_stages) if self.settings.driver_stage else 1.0
        return cut(estimate_costs(blocks), self._num_stages, first_share=share)

    def _make_pipeline(self, layout: Layout) -> Pipeline:
        schedules = self.settings.shape.schedules(len(layout.stage_blocks))
        phases.reach(phases.Phase.MEETING)
        for rank, link in zip(layout.workers, self._job.acquire(len(layout.workers)), strict=True):
            self.links.add(rank, layout.stages_of(rank), link)
        return Pipeline(
            layout=layout,
            schedules=schedules,
            links=self.links,
            store=self._job.pool.store,
            generations=self._job.pool.generations,
            rendezvous=dataclasses.replace(self._job.rendezvous(), backend=self.settings.network.backend),
            rank=self._rank,
            devices=self._devices,
        )

    def _keep_whole(
        self,
        pipeline: Pipeline,
        blocks: Sequence[nn.Module],
        policy: RecoveryPolicy,
        report: Callable[[RecoveryEvent | MoveEvent], None],
    ) -> None:
        mover = self._mover_of(pipeline, blocks, policy, report) if policy.elastic else None
        pipeline.keeper = StageKeeper(pipeline, policy, self._job, report, mover)
        if policy.swap_ends:
            pipeline.use_schedule(TRAINING, swap_ends(pipeline.schedules[TRAINING]))

    def _mover_of(
        self,
        pipeline: Pipeline,
        blocks: Sequence[nn.Module],
        policy: RecoveryPolicy,
        report: Callable[[RecoveryEvent | MoveEvent], None],
    ) -> Mover:
        check_elastic(self.settings)
        num_microbatches = pipeline.schedules[TRAINING].num_microbatches
        hosted, costs = len(pipeline.layout.hosted(self._rank)), estimate_costs(blocks)
        return Mover(
            pipeline,
            self._job,
            ElasticShapes(self.settings, costs, hosted, num_microbatches, swap=policy.swap_ends),
            replicas=self.settings.replicas,
            spares=policy.spares,
            adopted=lambda: self._plan_paths(pipeline.schedules[TRAINING]),
            report=report,
        )

    # ---------------------------------------------------------------- steps

    @property
    def runs_whole(self) -> bool:
        """Whether the user's step runs once, on the whole batch, so that only the stack's input is cut."""
        return self.settings.microbatches == "stack" or len(self.pipeline.microbatches) == 1

    def train(
        self, task: StepTask | WholeTask, step: int, batch: object = None, *, states: States | None = None
    ) -> tuple[list[Any], Tensor | None]:
        """Run a training step; see :meth:`Pipeline.train`.

        Args:
            task: What to do.
            step: The number of optimizer steps so far.
            batch: Stands for the batch whose call of the blocks it is, where there may be several: they take the same
                paths, also when they run once more.
            states: What it wants of the blocks' states, where the task does not say it.
        """
        task = task if states is None else dataclasses.replace(task, states=states)

        def choose() -> None:
            self._choose_paths(step, batch)
            self._order_losses(last=task.losses_come_last)

        phases.reach(phases.Phase.TRAINING, step)
        return self.pipeline.train(task, choose)

    def take_same_paths(self, batch: object) -> None:
        """Let further calls for a batch take the paths of the last training step, which was for it, too."""
        self._chosen_for = batch

    def evaluate(self, task: StepTask | WholeTask) -> list[Any]:
        """Run functions without gradients; see :meth:`Pipeline.evaluate`."""
        phases.reach(phases.Phase.VALIDATING)
        return self.pipeline.evaluate(task, self._choose_evaluation_paths)

    def rehearse(self, task: StepTask | WholeTask, step: int, batch: object) -> list[Any]:
        """Run functions without gradients on the paths on which they will be trained; see :meth:`train`."""

        def choose() -> None:
            self._choose_paths(step, batch)
            schedules = self.pipeline.whole_schedules
            paths, known = schedules[TRAINING].paths, schedules.get(REHEARSAL)
            if known is None or known.paths != paths:
                self.pipeline.use_schedule(REHEARSAL, forward_only(schedules[TRAINING]))

        phases.reach(phases.Phase.TRAINING, step)
        return self.pipeline.evaluate(task, choose, REHEARSAL)

    @property
    def timeline(self) -> Timeline | None:
        """What the last measured training step did when; None before."""
        return self._pipeline.timeline if self._pipeline is not None else None

    def measure_costs(self) -> CostModel:
        """Measure the links between all ranks, and return them with the last measured step's seconds of compute.

        Every driver calls this alike, between two training steps, and gets the same.
        """
        return self._broadcast(measured_costs(self.pipeline))  # type: ignore[no-any-return]

    def take_up(self, costs: CostModel, schedule: Schedule | None = None) -> None:
        """Plan from other costs from now on, and run the next steps by another schedule of the same stages, if given.

        Every driver calls this alike, between two training steps.
        """
        assert self.planner is not None, "paths are not planned"
        self.planner.cost = costs
        if schedule is not None:
            self.planner.adopt(schedule)
            self.pipeline.use_schedule(TRAINING, schedule)

    def _plan_paths(self, exact: Schedule) -> None:
        settings = self.settings
        if not isinstance(settings.schedule, Schedule):
            self.planner, self._chosen_for = PathPlanner(settings.skip_ratio, settings.paths, exact), None
        if settings.paths.eval_skip_ratio:
            uniform = dataclasses.replace(settings.paths, costs="uniform")
            self._evaluation_planner = PathPlanner(settings.paths.eval_skip_ratio, uniform, exact)

    def _choose_paths(self, step: int, batch: object) -> None:
        """At the start of a training step: take up what became known, and the paths that the skip ratio asks for."""
        planner, pipeline = self.planner, self.pipeline
        phases.reach(phases.Phase.PLANNING)
        if planner is None or (batch is not None and batch is self._chosen_for):
            return
        self._chosen_for = batch
        if planner.has_measured and not pipeline.measure_next:
            planner.cost = self.measure_costs()
        if planner.measures:
            pipeline.measure_next = True
        self._learn_forms(planner)
        schedule = planner.next(step)
        if schedule is not None:
            pipeline.use_schedule(TRAINING, schedule)
            advice = planner.advice(schedule)
            if advice is not None and self._rank == 0 and not self._advised:
                log.warning(advice)
                self._advised = True

    def _order_losses(self, *, last: bool) -> None:
        """A loss that is computed from all outputs needs all forwards before the first backward."""
        pipeline, usual = self.pipeline, self._usual
        schedule = pipeline.whole_schedules[TRAINING]
        if last and schedule.name != "gpipe":
            losses_last = dataclasses.replace(gpipe(schedule.placement, schedule.paths), coupled=schedule.coupled)
            self._usual = losses_last, schedule
            pipeline.use_schedule(TRAINING, losses_last)
        elif not last and usual is not None:
            self._usual = None
            if schedule is usual[0]:
                pipeline.use_schedule(TRAINING, usual[1])

    def _choose_evaluation_paths(self) -> None:
        planner = self._evaluation_planner
        if planner is not None:
            self._learn_forms(planner)
            schedule = planner.next(0)
            if schedule is not None:
                self.pipeline.use_schedule(EVALUATION, forward_only(schedule))

    def _learn_forms(self, planner: PathPlanner) -> None:
        if planner.required is None:
            pipeline = self.pipeline
            forms, proxies = pipeline.forms, pipeline.proxies
            needed = proxies.exporting | proxies.entrances
            shaping = pipeline.layout.shaping_stages(forms, needed) if forms else None
            planner.required = self._broadcast(shaping)

    def rebalance_experts(self, loads: Mapping[str, Sequence[float]], steps: int) -> tuple[dict[str, Move], float]:
        """Move experts between the replicas that share them, where it pays; every driver calls this alike.

        Args:
            loads: Tokens of each expert in a step, by router.
            steps: Within how many steps a move must pay for itself.

        Returns:
            The moves by the experts' names, and the mean excess of the busiest rank's load before them.
        """
        pipeline, names = self.pipeline, self._block_names
        self._mover = self._mover or ExpertMover(pipeline)
        by_site: dict[Site, list[float]] = {}
        for (block, path), site in pipeline.shards.sites.items():
            own = [loads[name] for router in site.routers if (name := f"{names[block]}.{router}") in loads]
            if own:
                by_site[block, path] = [float(sum(each)) for each in zip(*own, strict=True)]
        before = self._mover.imbalance(by_site)
        moves = self._broadcast(self._mover.plan(by_site, steps))
        self._mover.move({site: move.placement for site, move in moves.items()})
        return {f"{names[block]}.{path}": move for (block, path), move in moves.items()}, before

    def spent_share(self, statistics: Mapping[str, RouterStatistics]) -> float:
        """Return the share of the blocks' products that the last step spent on a token, of all stages and slots.

        Args:
            statistics: By router: what its tokens chose.
        """
        pipeline = self.pipeline
        visits, layout = pipeline.gradients.visit_counts, pipeline.layout
        per_path = len(pipeline.schedules[TRAINING].paths[0].visits)
        num_microbatches = max(1.0, sum(visits.values()) / per_path)
        visited = [visits.get(layout.stage_of_block(block), 0) / num_microbatches for block in range(len(self._sizes))]
        return spent_share(self._sizes, visited, statistics)

    # -------------------------------------------------------------- weights

    def remote_block_names(self) -> dict[int, str]:
        """Return the names in the model of those blocks that are on workers, by their numbers."""
        hosted = set(self.pipeline.layout.hosted(self._rank))
        return {block: name for block, name in enumerate(self._block_names) if block not in hosted}


def _free(job: DriverJob, links: Links, heartbeat: Heartbeat | None) -> None:
    """Give the workers back of a model that nobody refers to any more."""
    if heartbeat is not None:
        heartbeat.close()
    links.tell_survivors(EndRun(links.generation))
    job.release(list(links))


def _start_alike(model: nn.Module) -> None:
    """Give every driver the weights of the first."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_meta:
                dist.broadcast(carried := for_gloo(tensor), 0)
                if carried is not tensor:
                    tensor.copy_(carried)


def _names_in(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Name blocks in the model; a module that is several of them has the names of its places, as far as they go."""
    names = {id(part): name for name, part in model.named_modules()}
    places: dict[int, list[str]] = {}
    for name, part in model.named_modules():
        for key, child in part._modules.items():
            places.setdefault(id(child), []).append(f"{name}.{key}" if name else key)
    counts, seen = Counter(map(id, blocks)), Counter[int]()
    found = []
    for each in map(id, blocks):
        found.append(names[each] if counts[each] == 1 else places[each][min(seen[each], len(places[each]) - 1)])
        seen[each] += 1
    return tuple(found)


def _check_routers_apart(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    shared = in_common(blocks)
    for name, site in find_routers(model).items():
        if id(site.router) in shared:
            raise SkipPipeError(
                f"the router {name} is part of several blocks, so what it does at each depth is counted apart, where "
                "its biases and losses would need the sum; leave moe out, and the model trains as it is, or give each "
                "block a router of its own"
            )


def _warn_lost(blocks: Sequence[str]) -> None:
    if blocks:
        warnings.warn(
            f"the weights of {', '.join(blocks)} were lost with their worker and are NaN now; load a checkpoint",
            stacklevel=2,
        )


def measured_costs(pipeline: Pipeline) -> CostModel | None:
    """Measure the links, and return them with the last measured step's seconds; None but on the first driver."""
    stages = pipeline.layout.stage_blocks
    sizes = tuple(pipeline.forms[block].num_bytes for block in (0, *(blocks.stop for blocks in stages)))
    network = pipeline.measure_links(max(sizes))
    if pipeline.timeline is None:  # the first driver alone has one
        return None
    return CostModel(fit_costs(pipeline.timeline, pipeline.schedules[TRAINING]).compute, network, sizes)
