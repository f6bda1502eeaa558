"""A pipeline under an accelerator: composed with it, in the manner of accelerate's ``LocalSGD``.

accelerate has no plugin for another kind of distribution, so the few methods that must know of the workers are replaced
on the accelerator *instance*, until :meth:`SkipPipe.close`. Everything else of accelerate runs as for one process.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..driver.capture.remote import is_remote
from ..driver.moving import MoveEvent
from ..driver.optimizer import RemoteOptimizer
from ..driver.recovery import RecoveryEvent
from ..engine.errors import SkipPipeError
from ..job.job import DriverJob, Launcher, driver_job
from ..model.calls import ModelCalls
from ..model.compiled import CompiledParts, originals
from ..model.panel import start_panel
from ..model.spread import SpreadModel
from ..model.whole import WholeModel
from ..partition import check_no_shared_parameters, find_blocks
from .config import SkipPipeConfig

log = logging.getLogger(__name__)

_STATE_FILE: Final = "skippipe.json"
_DEFAULT_STAGES: Final = 4
_REPLACED: Final = (
    "prepare_model",
    "prepare_optimizer",
    "backward",
    "clip_grad_norm_",
    "clip_grad_value_",
    "save_model",
    "free_memory",
    "end_training",
)


class SkipPipe:
    """Runs the model of an accelerator as a pipeline.

    Args:
        accelerator: Of one process.
        model: A prepared model, to be spread on entering. None: the model that ``accelerator.prepare`` gets next.
        config: Settings; by default those of the environment.

    Example:
        The loop of accelerate stays as it is::

            accelerator = Accelerator()
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            with SkipPipe(accelerator, model, SkipPipeConfig(num_stages=4)):
                for batch in loader:
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    Raises:
        SkipPipeError: The accelerator distributes the model itself, or scales the loss.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module | None = None, config: SkipPipeConfig | None = None
    ) -> None:
        self.config = config if config is not None else SkipPipeConfig.from_environment()
        self.events: list[RecoveryEvent | MoveEvent] = []
        """The recoveries so far, in order."""
        self._accelerator = accelerator
        self._given = model
        self._num_stages = 0
        self._job: DriverJob | None = None
        self._spread: SpreadModel | None = None
        self._calls: ModelCalls | None = None
        self._whole: WholeModel | None = None
        self._compiled: CompiledParts | None = None
        self._model: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._remote: RemoteOptimizer | None = None
        self._handles: list[Any] = []  # Any: torch's removable handles
        self._hooks: list[Any] = []
        _check(accelerator)

    # ----------------------------------------------------------------- life

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self, launcher: Launcher | None = None, num_processes: int | None = None) -> None:
        """Start the workers, and take charge of the model given or of the next one that is prepared.

        Args:
            launcher: What started this process beside its workers; None: workers are started here.
            num_processes: How many processes the launcher started.
        """
        if self._job is not None:
            return
        self._num_stages = self._choose_num_stages(num_processes)
        policy = self.config.recovery
        self._job = driver_job(self.config.network, 1, launcher)
        num_workers = (self._num_stages - self.config.driver_stage) * self.config.replicas
        self._job.prepare(num_workers + (policy.spares if policy is not None else 0))
        self._replace_methods()
        if self._given is not None:
            self._take_model(self._given)

    def close(self) -> None:
        """Bring the weights back into the model and the optimizer, and leave the accelerator as it was."""
        self.bring_back()
        for name in _REPLACED:
            self._accelerator.__dict__.pop(name, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._job = None

    def bring_back(self) -> None:
        """Make model and optimizer whole again in this process; the workers wait for the next model."""
        if self._calls is not None:
            self._calls.close()
        if self._whole is not None:
            self._whole.remove()
        try:
            if self._remote is not None:
                self._remote.detach()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            self._remote = self._optimizer = None
            self._calls = self._whole = self._model = None
            if self._spread is not None:
                self._spread.bring_back()
            self._spread = None
            if self._compiled is not None:
                self._compiled.restore()
            self._compiled = None

    @property
    def spread(self) -> SpreadModel:
        """The model's blocks: timelines, measured costs, the planner of paths.

        Raises:
            SkipPipeError: No model has been prepared.
        """
        if self._spread is None:
            raise SkipPipeError("no model is spread: call accelerator.prepare(model, ...) first")
        return self._spread

    @property
    def worker_pids(self) -> dict[int, int]:
        """By rank: the process ids of the workers on this host."""
        return self._spread.worker_pids if self._spread is not None else {}

    def _choose_num_stages(self, num_processes: int | None) -> int:
        if num_processes is not None:
            return self.config.stages_of(num_processes)
        if self.config.num_stages is not None:
            return self.config.num_stages
        num_gpus = torch.cuda.device_count() if self._accelerator.device.type == "cuda" else 0
        return self.config.stages_of(num_gpus) if num_gpus > 1 else _DEFAULT_STAGES

    # ------------------------------------------------------- model and optimizer

    def _take_model(self, model: nn.Module) -> None:
        """Spread a prepared model, and the optimizers that wait for it."""
        if self._model is not None:
            raise SkipPipeError(
                "a second model was prepared, but a pipeline runs one. Prepare models that are not trained with "
                "accelerator.prepare_model(model, evaluation_mode=True), or train one after the other with "
                "accelerator.free_memory() in between"
            )
        self._model = model
        try:
            self._spread_blocks(model)
            for optimizer in self._accelerator._optimizers:
                self._take_optimizer(optimizer, optimizer.state_dict())
        except BaseException:
            self.bring_back()
            raise

    def _spread_blocks(self, model: nn.Module) -> None:
        assert self._job is not None
        root, device, policy = getattr(model, "_orig_mod", model), self._accelerator.device, self.config.recovery
        stack = find_blocks(root, self.config.blocks)
        check_no_shared_parameters(root, stack)
        blocks, described = originals(stack.blocks), str(stack)
        self._compiled = CompiledParts(model, blocks)
        self._spread = SpreadModel(
            self.config,
            num_stages=self._num_stages,
            job=self._job,
            rank=0,
            device=device,
            worker_devices=_worker_devices(device, self._num_stages * self.config.replicas),
        )
        recovery = None if policy is None else (self.config.fit_recovery(policy), self._note)
        self._spread.spread(root, blocks, compile_with=self._compiled.options, recovery=recovery)
        if self.config.verbose:
            self._accelerator.print(start_panel(self._spread, root, blocks, described))
        self._calls = ModelCalls(
            self._spread, model, device, rewinds=policy is not None, weight=self.config.microbatch_weight
        )
        self._whole = WholeModel(model, root, self._spread, self._calls)

    def _take_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Extend an optimizer of the spread model to the workers, with the ``state`` that it has already."""
        assert self._model is not None
        own = {id(parameter) for parameter in self._model.parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        inner = _innermost(optimizer)
        if inner is self._optimizer:
            return
        if self._optimizer is not None:
            raise SkipPipeError("a second optimizer of the model: a pipeline steps one; give it parameter groups")
        calls = self._running()
        self._optimizer, self._remote = inner, RemoteOptimizer(self.spread.pipeline, inner)
        if state["state"]:
            self._remote.load_state_dict(state)
        self._hooks = [
            inner.register_step_pre_hook(lambda *_: calls.settle()),
            inner.register_step_post_hook(lambda *_: calls.count_optimizer_step()),
        ]

    def _running(self) -> ModelCalls:
        if self._calls is None:
            raise SkipPipeError("no model is spread: call accelerator.prepare(model, ...) first")
        return self._calls

    def _note(self, event: RecoveryEvent | MoveEvent) -> None:
        self.events.append(event)
        log.warning("%s", event)

    # ------------------------------------------------- in place of the accelerator's methods

    def _replace_methods(self) -> None:
        accelerator = self._accelerator
        for name in _REPLACED:
            accelerator.__dict__[name] = functools.partial(getattr(self, f"_{name}"), getattr(accelerator, name))
        self._handles += [
            accelerator.register_save_state_pre_hook(self._save_state),
            accelerator.register_load_state_pre_hook(self._load_state),
        ]

    def _prepare_model(
        self,
        original: Callable[..., nn.Module],
        model: nn.Module,
        device_placement: bool | None = None,
        evaluation_mode: bool = False,
    ) -> nn.Module:
        if evaluation_mode or model is self._model:
            return original(model, device_placement=device_placement, evaluation_mode=evaluation_mode)
        prepared = original(model, device_placement=False)  # the blocks go to their workers instead
        self._take_model(prepared)
        return prepared

    def _prepare_optimizer(
        self, original: Callable[..., Optimizer], optimizer: Optimizer, device_placement: bool | None = None
    ) -> Optimizer:
        state = optimizer.state_dict()  # accelerate moves it to where the parameters are, which may be nowhere
        prepared = original(optimizer, device_placement=device_placement)
        if self._model is not None:
            self._take_optimizer(prepared, state)
        return prepared

    def _backward(self, original: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        if self._calls is not None and not loss.requires_grad:
            raise SkipPipeError(
                "backward was asked for a loss without a gradient: the model was called after model.eval() or under "
                "torch.no_grad(). Call model.train() before the training calls"
            )
        if self._calls is None:
            original(loss, **kwargs)
            return
        try:
            original(loss, **kwargs)
            self._calls.complete()
        except BaseException:
            self._calls.abandon()
            raise

    def _clip_grad_norm_(
        self,
        original: Callable[..., Tensor],
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2,
    ) -> Tensor:
        members, local = self._to_clip(parameters)
        if len(members) == len(local):
            return original(local, max_norm, norm_type=norm_type)
        assert self._remote is not None
        return torch.tensor(self._remote.clip_norm(float(max_norm), float(norm_type), local))

    def _clip_grad_value_(
        self, original: Callable[..., None], parameters: Tensor | Iterable[Tensor], clip_value: float
    ) -> None:
        members, local = self._to_clip(parameters)
        original(local, clip_value)
        if len(members) > len(local):
            assert self._remote is not None
            self._remote.clip_value(float(clip_value))

    def _to_clip(self, parameters: Tensor | Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return all parameters to clip, and those of them that are here."""
        members = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        local = [parameter for parameter in members if not is_remote(parameter)]
        if self._calls is None or len(members) == len(local):
            return members, local
        self._calls.settle()
        asked = {id(parameter) for parameter in members}
        groups = self._optimizer.param_groups if self._optimizer is not None else ()
        trained = [p for group in groups for p in group["params"] if is_remote(p) and p.requires_grad]
        left_out = sum(id(parameter) not in asked for parameter in trained)
        if self._remote is None or left_out:
            raise SkipPipeError(
                f"gradients cannot be clipped without {left_out} of the {len(trained)} parameters that the workers "
                "train: pass model.parameters(), after accelerator.prepare(model, optimizer)"
            )
        return members, local

    def _save_model(self, original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(_Weights(model.state_dict()) if model is self._model else model, *args, **kwargs)

    def _free_memory(self, original: Callable[..., Any], *objects: Any) -> Any:
        self.bring_back()
        return original(*objects)

    def _end_training(self, original: Callable[[], None]) -> None:
        self.bring_back()
        original()

    def _save_state(self, models: Sequence[nn.Module], weights: Sequence[Any], output_dir: str) -> None:
        if self._calls is not None:
            state = self._calls.state() | {
                "lr_factors": list(self.spread.pipeline.gradients.lr_factors_of_blocks.items())
            }
            (Path(output_dir) / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _load_state(self, models: Sequence[nn.Module], input_dir: str) -> None:
        file = Path(input_dir) / _STATE_FILE
        if self._calls is not None and file.exists():  # other checkpoints of accelerate fit as well
            state = json.loads(file.read_text(encoding="utf-8"))
            self.spread.pipeline.gradients.lr_factors_of_blocks = dict(map(tuple, state.pop("lr_factors")))
            self._calls.load_state(state)


class _Weights(nn.Module):
    """Has a ``state_dict`` and no parameters, which accelerate would find to be without values."""

    def __init__(self, weights: dict[str, Any]) -> None:
        super().__init__()
        self._weights = weights

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._weights


def _check(accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1 or accelerator.use_distributed:
        raise SkipPipeError(
            f"the accelerator distributes over {accelerator.num_processes} processes itself ("
            f"{accelerator.distributed_type}); start one process, or make a SkipPipeAccelerator, which turns the other "
            "processes into workers"
        )
    if accelerator.scaler is not None:
        raise SkipPipeError(
            "mixed_precision='fp16' scales the loss, which stages on other processes cannot follow yet; "
            "use mixed_precision='bf16'"
        )


def _innermost(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _worker_devices(device: torch.device, num_workers: int) -> dict[int, str]:
    if device.type != "cuda":
        return {}
    count = torch.cuda.device_count()
    return {rank: f"cuda:{rank % count}" for rank in range(1, num_workers + 1)}
