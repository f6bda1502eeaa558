"""The Lightning strategy: a single-device run to Lightning, a pipeline underneath.

This module adapts; what a pipeline is lives in :mod:`skippipe_plugin.driver`. Only the driver runs a Trainer.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from ..checked import COUNT, NUM_PROCESSES, SHARE, checked
from ..driver.backward import GradientScale
from ..driver.capture.batches import Cutter
from ..driver.capture.devices import move_around
from ..driver.capture.remote import check_is_here
from ..driver.capture.rewind import rewinder
from ..driver.devices import Devices
from ..driver.moving import MoveEvent
from ..driver.optimizer import to_device
from ..driver.pipeline import TRAINING
from ..driver.recovery.policy import RecoveryPolicy
from ..driver.recovery.report import RecoveryEvent
from ..driver.routers import RouterControl
from ..driver.unfinished import CalledTwice
from ..driver.whole_step import WholeTask
from ..engine.call import block_seed
from ..engine.control.values import States
from ..engine.device import own_place
from ..engine.errors import SkipPipeError
from ..engine.pairs import prepare
from ..job.job import DriverJob, driver_job, worker_job
from ..job.network import NetworkConfig
from ..model.asking import Asking
from ..model.compiled import CompiledParts, originals
from ..model.config import PathConfig
from ..model.panel import start_panel
from ..model.settings import CutWhere, PipelineSettings, ScheduleName
from ..model.shares import whole_share
from ..model.skipping import PathPlanner, SkipRatio
from ..model.spread import SpreadModel
from ..model.verify import Agreement
from ..model.wanted import FirstRuns, with_outputs
from ..model.weight import MicrobatchWeight
from ..moe import MoEConfig, RouterStatistics
from ..moe.families import find_routers
from ..moe.migration import Move
from ..moe.precision import kept_biases, widen_biases
from ..partition import find_blocks
from ..schedule import CostModel, Schedule, Timeline
from ..sources import workers_of
from ..supervisor import supervised
from ..worker import end_with_driver
from .checks import check_fit
from .compiled import uncompile
from .continuation import FROM_MEMORY, Continuation
from .cut_step import CutStep, PreparedStep, asking_of
from .cut_step import prepare as prepare_step
from .gathering import Gather, GatheringStrategy
from .launcher import SkipPipeLauncher, apply_results, collect_results
from .loaders import loader_hint
from .open_steps import begun_step, noted_call, opened_steps
from .outputs import with_loss, without_loss
from .verify import Verify, check_step, verify_first
from .whole_step import WholeStep

log = logging.getLogger(__name__)


@checked(skip_ratio=SHARE, num_microbatches=COUNT, replicas=NUM_PROCESSES, drivers=NUM_PROCESSES)
class SkipPipeStrategy(GatheringStrategy):
    """Train an unchanged LightningModule as a pipeline of stages on other processes.

    ``Trainer(devices=N, strategy=SkipPipeStrategy())`` uses N processes: one driver, which runs the Trainer, the
    embedding, the head and the loss, and N - 1 workers, which hold the blocks. The result is that of
    ``Trainer(devices=1)``, to floating-point reordering.

    Args:
        skip_ratio: The share of stages that every path leaves out: a number (0: exact), ``{step: ratio}`` with the
            optimizer step from which each ratio holds, or a function of the step.
        schedule: ``"1f1b"`` (also ``"auto"``), ``"gpipe"``, or a :class:`~skippipe_plugin.schedule.Schedule`.
        num_microbatches: Into how many microbatches a batch is cut; four per stage by default. A batch with fewer
            samples makes fewer.
        microbatches: What they are cut from: the ``"batch"``, so that each step of the module runs once for every
            microbatch; or what enters the block ``"stack"``, while the step runs once, on the whole batch. The latter
            is exact for every loss (contrastive ones, BatchNorm on the driver, labels in unequal numbers) and draws
            the random numbers of one process, but every forward comes before the loss, and embedding and head have
            the whole batch at once. ``"auto"``: the batch, where it can be cut and one process's result follows.
        microbatch_weight: What a microbatch's loss weighs in the batch's: a function of the microbatch, ``"samples"``,
            or ``"sum"`` (losses add up). By default that is found out by trying the step before the first batch.
        replicas: How many workers hold each stage.
        drivers: How many processes run the Trainer, each on its own share of the data.
        blocks: The name of the block stack, such as ``"model.layers"``, or ``"model.layer*6"``, or of several, in the
            order in which every forward calls them: ``["model.encoder", "model.decoder"]``. None: the largest one.
        driver_stage: Whether the driver holds the first stage itself, so that N processes make N stages.
        gradient_scale: Whether the gradient of a stage is the mean over all microbatches of the batch (``"batch"``)
            or over those that visited the stage (``"visit"``); the same when nothing is skipped.
        paths: Limits of partial paths, and where their planner's costs come from.
        network: Where the processes meet.
        moe: How the experts of the model are routed and computed; None leaves them alone.
        verbose: Whether a run says when it starts who holds what, in the manner of Lightning's model summary.
        verify: ``"first"``: before ``fit`` begins, the first batch is trained on in one process and as a pipeline, with
            copies of the module, and a difference is an error (see :meth:`check`); ``"off"`` does not.
        gather: Whether a run ends with the blocks' weights, and the optimizer's state for them, in the model:
            ``"always"``; ``"never"``: they stay on the workers, from where the next run of this strategy goes on, and
            the model reads them there, until :meth:`gather` is called; ``"auto"``: where this host has memory for them.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(
        ...     accelerator="cpu", devices=3, strategy=SkipPipeStrategy(num_microbatches=4), logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.strategy.num_stages
        2
    """

    strategy_name = "skippipe"

    def __init__(
        self,
        *,
        skip_ratio: SkipRatio = 0.0,
        schedule: ScheduleName | Schedule = "auto",
        num_microbatches: int | None = None,
        microbatches: CutWhere = "auto",
        microbatch_weight: MicrobatchWeight | None = None,
        replicas: int = 1,
        drivers: int = 1,
        blocks: str | Sequence[str] | None = None,
        driver_stage: bool = False,
        gradient_scale: GradientScale = "batch",
        paths: PathConfig | None = None,
        network: NetworkConfig | None = None,
        moe: MoEConfig | None = None,
        verbose: bool = True,
        verify: Verify = "off",
        gather: Gather = "auto",
    ) -> None:
        settings = PipelineSettings(
            skip_ratio=skip_ratio,
            schedule=schedule,
            num_microbatches=num_microbatches,
            microbatches=microbatches,
            microbatch_weight=microbatch_weight,
            replicas=replicas,
            drivers=drivers,
            blocks=blocks,
            driver_stage=driver_stage,
            gradient_scale=gradient_scale,
            paths=paths or PathConfig(),
            network=network or NetworkConfig(),
            moe=moe,
            verbose=verbose,
        )
        chosen = workers_of(settings.network.workers)
        per_device = settings.network.workers_per_device
        brings_workers = chosen not in (None, "launched")
        super().__init__(drivers, settings, gather, brings_workers=brings_workers, per_device=per_device)
        self.verify = verify
        """Whether a fit compares its first batch with one process."""
        self._said = ""
        self._job: DriverJob | None = None
        self._asking: Asking | None = None
        self._restore_late = False
        self._cutter = Cutter()
        self._firsts = FirstRuns()
        self._record_timeline = False

    # ------------------------------------------------------- what Lightning reads

    @property
    def num_stages(self) -> int:
        """The number of block stages that ``devices`` makes."""
        return self.settings.shape.num_stages(self.num_processes)

    @property
    def record_timeline(self) -> bool:
        """Whether training steps are measured; set it before or during ``fit``, read :attr:`timeline`."""
        return self._record_timeline

    @record_timeline.setter
    def record_timeline(self, record: bool) -> None:
        self._record_timeline = record
        if self._is_spread:
            self._running().pipeline.collect_timeline = record

    @property
    def timeline(self) -> Timeline | None:
        """What the last measured training step did when, on every rank; None before, and on further drivers."""
        return self._running().timeline if self._is_spread else self._timeline

    def measure_step(self) -> None:
        """Measure the coming training step, and leave its :attr:`timeline`; every driver calls this alike."""
        if self._spread is None or self._spread.is_spread:  # as it ends there is no further one
            self._running().pipeline.measure_next = True

    def measure_costs(self) -> CostModel:
        """Measure the links between all ranks, and return them with the last measured step's seconds of compute.

        Every driver calls this alike, between two training steps, and gets the same.
        """
        return self._running().measure_costs()

    @property
    def planner(self) -> PathPlanner | None:
        """What plans the paths of training steps; None with a schedule of your own."""
        return self._spread.planner if self._spread is not None else None

    def take_up(self, costs: CostModel, schedule: Schedule | None = None) -> None:
        """Plan from other costs from now on, and run the next steps by another schedule of the same stages, if given.

        Every driver calls this alike, between two training steps.
        """
        self._running().take_up(costs, schedule)

    @property
    def costs(self) -> CostModel | None:
        """What paths are planned from (``costs.table()``, ``costs.save(file)``); None until it is known."""
        return self.planner.cost if self.planner is not None else None

    @property
    def routers(self) -> RouterControl:
        """The routers of the model's experts, with ``moe=MoEConfig(...)``: what they did, and their biases."""
        return self._running().pipeline.routers

    def rebalance_experts(self, loads: Mapping[str, Sequence[float]], steps: int) -> tuple[dict[str, Move], float]:
        """Move experts between the replicas that share them; see :meth:`SpreadModel.rebalance_experts`."""
        return self._running().rebalance_experts(loads, steps)

    def spent_share(self, statistics: Mapping[str, RouterStatistics]) -> float:
        """Return the share of the blocks' products that a token really got; see :meth:`SpreadModel.spent_share`."""
        return self._running().spent_share(statistics)

    @property
    def visit_counts(self) -> dict[int, int]:
        """By stage: how many microbatches visited it in the last training step."""
        return self._running().pipeline.gradients.visit_counts

    @property
    def lr_factors(self) -> dict[int, float]:
        """By stage: what its learning rate is multiplied with, for stages that were rebuilt from their neighbours."""
        return self._running().pipeline.gradients.lr_factors

    @property
    def lr_factors_of_blocks(self) -> dict[int, float]:
        """The same by block: what a run goes on with, whatever its number of stages."""
        return self._running().pipeline.gradients.lr_factors_of_blocks

    @lr_factors_of_blocks.setter
    def lr_factors_of_blocks(self, factors: Mapping[int, float]) -> None:
        self._running().pipeline.gradients.lr_factors_of_blocks = factors

    @property
    def worker_pids(self) -> dict[int, int]:
        """By rank: the process ids of the workers on this driver's host."""
        return self._spread.worker_pids if self._spread is not None else {}

    @property
    def spare_pids(self) -> list[int]:
        """The process ids of the idle workers on this driver's host."""
        return [link.pid for link in self._job.idle() if link.pid is not None] if self._job is not None else []

    def use_recovery(self, policy: RecoveryPolicy, report: Callable[[RecoveryEvent | MoveEvent], None]) -> None:
        """Replace workers that are lost from the next run on; called by the StageRecovery callback."""
        if self.drivers > 1:
            raise SkipPipeError(f"lost workers can be replaced for one driver only, not for drivers={self.drivers}")
        policy = self.settings.fit_recovery(policy)
        self._recovery = policy, report
        if self._job is not None:
            self._job.prepare(self.num_processes - self.drivers + policy.spares)

    @property
    def training_schedule(self) -> Schedule | None:
        """The schedule of training steps, once it is known."""
        return self._running().pipeline.schedules[TRAINING] if self._is_spread else None

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        # Weights that were never made on the driver (meta device) can only be loaded where the blocks are.
        module = self.lightning_module
        if not self._is_spread and module is not None:
            self._restore_late = any(parameter.is_meta for parameter in module.parameters())
        return self._restore_late

    @override
    def _configure_launcher(self) -> None:
        self._launcher = SkipPipeLauncher(self._run_or_serve)

    def _run_or_serve(self, function: functools.partial[Any], trainer: Trainer | None) -> Any:
        """Run what the Trainer launches, or serve as a worker in its place."""
        _ = self.num_stages  # devices that do not fit are an error before anything starts
        launcher = self.read_launcher()
        if launcher is None and self.process_nodes > 1:
            raise SkipPipeError(
                f"num_nodes={self.process_nodes} needs a launcher that starts the script on every one: torchrun or "
                "srun; or leave num_nodes out and let workers of other machines join (skippipe worker --join)"
            )
        if launcher is not None:
            self.cluster_environment.validate_settings(len(self.process_devices or ()), self.process_nodes)
            if launcher.rank >= self.drivers:
                return apply_results(worker_job(launcher, self.settings.network).serve(), trainer)
        end_with_driver()
        fits = self._join().fits if supervised() and not self.is_probe else None
        if fits is not None and trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._continuation = Continuation(fits, trainer)
            function = self._continuation.resuming(function)
        try:
            result = function()
            self.barrier()
        except BaseException as error:
            try:
                if self._rest is None:
                    self._bring_back(over=False)  # before the workers of a launcher leave
            except SkipPipeError as another:
                log.warning("the model could not be brought back whole after the failure: %s", another)
            self._dismiss({"error": f"{type(error).__name__}: {error}"})
            raise
        self._dismiss(collect_results(result, trainer))
        return result

    def _dismiss(self, results: Mapping[str, Any]) -> None:
        if self._job is not None and not self.is_probe:
            self._job.dismiss(results)

    # ----------------------------------------------------------------- life

    @override
    def setup_environment(self) -> None:
        prepare(self.settings.network.backend)  # Lightning starts the device
        super().setup_environment()
        # The workers import torch while the user's hooks prepare model and data.
        job = self._join()
        if self._rest is None:
            job.prepare(self.num_processes - self.drivers)
        if self.drivers > 1:
            self.form_default_group(job.store)

    def _join(self) -> DriverJob:
        self._job = driver_job(self.settings.network, self.drivers, self.read_launcher())
        return self._job

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        module = self.lightning_module
        assert module is not None
        self.accelerator.setup(trainer)
        self._check_gather()
        check_fit(module, trainer, self.settings)
        if self._wake(module):
            self.model = module
            uncompile(module)  # Lightning compiles it for each run
            self.model_to_device()
            if self.verify == "first" and trainer.state.fn == TrainerFn.FITTING:
                log.info("verify='first' compares nothing now: the blocks are on their workers since the run before")
        else:
            if self.verify == "first" and trainer.state.fn == TrainerFn.FITTING:
                verify_first(self, trainer, module)
            with self._kept_biases(module):
                self.model = self.precision_plugin.convert_module(module)
            self._spread_blocks(module)
        self._begin_run(module)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in self.optimizers:
                to_device(optimizer, self.root_device)

    def _kept_biases(self, module: nn.Module) -> AbstractContextManager[None]:
        moe = self.settings.moe
        return kept_biases(module) if moe is not None and moe.exact_bias else nullcontext()

    @override
    def model_to_device(self) -> None:
        """Move what the driver keeps; called before the remote blocks leave."""
        assert self.model is not None
        _update_properties(self.model, device=self.root_device)
        move_around(self.model, set(self._running().remote_blocks), self.root_device)

    @override
    def _forget_run(self) -> None:
        self._asking, self._firsts = None, FirstRuns()

    def _spread_blocks(self, module: LightningModule) -> None:
        assert self._job is not None
        check_is_here(module)
        stack = find_blocks(module, self.settings.blocks)
        blocks, described = originals(stack.blocks), str(stack)
        self._compiled = CompiledParts(module, blocks, uncompile(module))
        compilation = self._compiled.compilation
        self._spread = SpreadModel(
            self.settings,
            num_stages=self.num_stages,
            job=self._job,
            rank=self.global_rank,
            devices=Devices(
                self.root_device,
                own_place(),
                tuple(self.process_devices or ()),
                self.drivers,
                self.settings.network.workers_per_device,
            ),
            broadcast=self.broadcast,
        )
        self._spread.spread(
            module,
            blocks,
            compilation=compilation,
            recovery=self._recovery,
            move=self.model_to_device,
        )
        if self.settings.verbose and (said := str(start_panel(self._spread, module, blocks, described))) != self._said:
            rank_zero_info(said)
            self._said = said

    def _begin_run(self, module: LightningModule) -> None:
        """Get ready for the steps of one run, whose blocks are on their workers."""
        spread = self._running()
        is_manual = not module.automatic_optimization and module.trainer.state.fn == TrainerFn.FITTING
        spread.settings = dataclasses.replace(self.settings, microbatches="stack") if is_manual else self.settings
        spread.pipeline.collect_timeline = self._record_timeline
        self._forget_run()
        self._asking = asking_of(module, spread, self.root_device)
        if is_manual:
            self._open_steps(module)

    # ------------------------------------------------------------ comparison

    def check(self, module: LightningModule, batch: Any, **options: Any) -> Agreement:
        """Take one training step on ``batch`` in one process and as this pipeline, and compare what the two leave.

        Loss, logged values, gradients and updated weights, in double precision where the module can. Both run on
        copies of ``module``, with its hooks, without callbacks and loggers, and with dropout off. For whatever is
        known to differ (a skip ratio, experts of ``moe``) this says nothing.

        Args:
            module: A module that no Trainer is busy with; it stays as it is.
            batch: What a data loader would give.
            options: Arguments of the Trainer that the step depends on, such as ``gradient_clip_val``.

        Raises:
            SkipPipeError: They differ; the message names the first difference and its likely kind.

        Example:
            >>> from lightning.pytorch import Trainer
            >>> trainer = Trainer(accelerator="cpu", devices=3, strategy=SkipPipeStrategy(), logger=False)
            >>> trainer.strategy.check(module, batch)  # doctest: +SKIP
            Agreement(num_gradients=52, num_weights=52, largest=3.1e-15)
        """
        return check_step(self, module, batch, options)

    @property
    def _is_spread(self) -> bool:
        return self._spread is not None and self._spread.is_spread

    @override
    def _running(self) -> SpreadModel:
        if self._spread is None:
            raise SkipPipeError("the pipeline is not set up: call this from inside fit, validate, test or predict")
        return self._spread

    # ---------------------------------------------------------------- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._continuation is None:
            return self._train(args, kwargs)
        return self._continuation.step(lambda: self._train(args, kwargs))

    def _train(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, batch, rest = self._step_arguments(args)
        running = self._running()
        self._check_optimizers()
        if running.attached is not None:
            running.attached.begin_step(module.trainer.global_step)
        with self.precision_plugin.train_step_context():
            cut = None if self._open is not None else self._cut_step("training_step", batch, rest, kwargs)
            if self._open is None and self._asking is not None and self._asking.most_calls > 1:
                self._open_steps(module, self._asking.most_calls)
            whole, begun = WholeStep(module, "training_step", args, kwargs, self.root_device), None
            if self._open is None:
                undo = None if cut and cut.is_tried else self._firsts.undo("training_step", whole.note_state)
                noted, states = noted_call(running, is_first=undo is not None, is_cut=cut is not None and cut.is_cut)
                run = functools.partial(self._train_closed, module, whole, cut, states)
                try:
                    return with_outputs(running, run, undo, is_noted=True)
                except CalledTwice as called:
                    begun = begun_step(called, noted, undo)
                    self._open_steps(module, 2)
            assert self._open is not None
            return self._open.run(whole, self._seed(), module.trainer.global_step, begun)

    def _train_closed(
        self, module: LightningModule, whole: WholeStep, cut: PreparedStep | None, states: States | None
    ) -> Any:
        train = functools.partial(self._running().train, step=module.trainer.global_step, states=states)
        if cut is None or not cut.is_cut:
            share = 1 / self.drivers if cut is None else whole_share(cut.merging, self.gather_objects)
            with whole.logging():
                values, loss = train(self._whole_task(whole, share))
            return with_loss(without_loss(values[0]), loss)
        return cut.run(train, self._seed(), self._rewinder(module), self.gather_objects)

    def _open_steps(self, module: LightningModule, num_calls: int = 0) -> None:
        self._open = opened_steps(self._running(), module, self.root_device, num_calls, repeats=bool(self._recovery))

    def _cut_step(self, name: str, batch: Any, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PreparedStep | None:
        """Cut a step, and find out how its results merge; see :func:`prepare`."""
        module, asking, weight = self.lightning_module, self._asking, self.settings.microbatch_weight
        assert module is not None
        assert asking is not None
        source = f"{name} {rest[1:]} {kwargs.get('dataloader_idx')}"
        cut = functools.partial(self._cutter.cut, batch, hint=loader_hint(module.trainer, name), source=source)
        step = functools.partial(CutStep, module, name, batch, rest=rest, kwargs=kwargs, weight=weight)
        running = self._running()
        return with_outputs(running, lambda: prepare_step(step, name, running, cut, asking, self.gather_objects))

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.val_step_context():
            return self._evaluate("validation_step", args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.test_step_context():
            return self._evaluate("test_step", args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.predict_step_context():
            return self._evaluate("predict_step", args, kwargs)

    def _evaluate(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._open is not None:
            self._open.settle(name)
        module, batch, rest = self._step_arguments(args)
        cut = self._cut_step(name, batch, rest, kwargs)
        if cut is None or not cut.is_cut:
            whole = WholeStep(module, name, args, kwargs, self.root_device)
            running, undo = self._running(), self._firsts.undo(name, whole.note_state)
            logged = whole.logging()(lambda: running.evaluate(self._whole_task(whole))[0])
            return with_outputs(running, logged, undo)
        evaluate = self._running().evaluate
        return cut.run(lambda task: (evaluate(task), None), self._seed(), self._rewinder(module), self.gather_objects)

    def _whole_task(self, whole: WholeStep, share: float = 1.0) -> WholeTask:
        assert self._asking is not None
        return whole.task(self._seed(), self._asking, share=share, repeats=self._recovery is not None)

    def _rewinder(self, module: LightningModule) -> Callable[[], None]:
        return rewinder(module) if self._recovery is not None else lambda: None

    def _step_arguments(self, args: tuple[Any, ...]) -> tuple[LightningModule, Any, tuple[Any, ...]]:
        assert self.lightning_module is not None
        return self.lightning_module, args[0], args[1:]

    def _seed(self) -> int:
        """A seed for this step that a resumed run has again at the same batch."""
        assert self.lightning_module is not None
        return block_seed(torch.initial_seed(), self.lightning_module.trainer.fit_loop.epoch_loop.total_batch_idx)

    # ----------------------------------------------------------- checkpoints

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if checkpoint_path == FROM_MEMORY and self._continuation is not None:
            return self._continuation.checkpoint(self._recovery)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        if self.settings.moe is not None and self.settings.moe.exact_bias and self._spread is None:
            widen_biases(find_routers(self.lightning_module).values())
        super().load_model_state_dict(checkpoint, strict)
