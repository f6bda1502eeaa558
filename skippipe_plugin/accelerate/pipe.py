"""A pipeline under an accelerator: composed with it, in the manner of accelerate's ``LocalSGD``.

accelerate has no plugin for another kind of distribution, so the few methods that must know of the workers are replaced
on the accelerator *instance*, until :meth:`SkipPipe.close`. Everything else of accelerate runs as for one process.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checked import checked
from ..driver.loss_scaling import check_scaler
from ..driver.moving import MoveEvent
from ..driver.recovery.report import RecoveryEvent
from ..engine.errors import SkipPipeError
from ..job.job import DriverJob
from ..job.launcher import Launcher
from ..model.loop import LoopModel, open_job
from ..model.loop_config import SkipPipeConfig
from ..model.spread import SpreadModel

_STATE_FILE: Final = "skippipe.json"
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


@checked()
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
        SkipPipeError: The accelerator distributes the model itself, or has a loss scaler of another kind than torch's.
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
        self._loop: LoopModel | None = None
        self._handles: list[Any] = []  # Any: torch's removable handles
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
        self._job, self._num_stages = open_job(self.config, self._accelerator.device, launcher, num_processes)
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
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.bring_back()
            for optimizer in self._accelerator._optimizers:
                _renew(optimizer)

    @property
    def spread(self) -> SpreadModel:
        """The model's blocks: timelines, measured costs, the planner of paths.

        Raises:
            SkipPipeError: No model has been prepared.
        """
        return self._running().blocks

    @property
    def worker_pids(self) -> dict[int, int]:
        """By rank: the process ids of the workers on this host."""
        return self._loop.blocks.worker_pids if self._loop is not None else {}

    # ------------------------------------------------------- model and optimizer

    def _take_model(self, model: nn.Module) -> None:
        """Spread a prepared model, and the optimizers that wait for it."""
        if self._loop is not None:
            raise SkipPipeError(
                "a second model was prepared, but a pipeline runs one. Prepare models that are not trained with "
                "accelerator.prepare_model(model, evaluation_mode=True), or train one after the other with "
                "accelerator.free_memory() in between"
            )
        assert self._job is not None
        device = self._accelerator.device
        self._loop = LoopModel(
            model,
            self.config,
            job=self._job,
            num_stages=self._num_stages,
            device=device,
            events=self.events,
            scale=lambda: 1 / self._accelerator.gradient_accumulation_steps,
            scaler=self._accelerator.scaler,
        )
        try:
            self._loop.spread(self._accelerator.print)
            for optimizer in self._accelerator._optimizers:
                self._take_optimizer(optimizer, optimizer.state_dict())
        except BaseException:
            self.bring_back()
            raise

    def _take_optimizer(self, prepared: Optimizer, state: Mapping[str, Any]) -> None:
        self._running().take_optimizer(_innermost(prepared), state)
        _renew(prepared)

    def _running(self) -> LoopModel:
        if self._loop is None:
            raise SkipPipeError("no model is spread: call accelerator.prepare(model, ...) first")
        return self._loop

    def _is_ours(self, model: nn.Module) -> bool:
        return self._loop is not None and model is self._loop.model

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
        if evaluation_mode or self._is_ours(model):
            return original(model, device_placement=device_placement, evaluation_mode=evaluation_mode)
        prepared = original(model, device_placement=False)  # the blocks go to their workers instead
        self._take_model(prepared)
        return prepared

    def _prepare_optimizer(
        self, original: Callable[..., Optimizer], optimizer: Optimizer, device_placement: bool | None = None
    ) -> Optimizer:
        state = optimizer.state_dict()  # accelerate moves it to where the parameters are, which may be nowhere
        prepared = original(optimizer, device_placement=device_placement)
        if self._loop is not None:
            self._take_optimizer(prepared, state)
        return prepared

    def _backward(self, original: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        if self._loop is not None and not loss.requires_grad:
            raise SkipPipeError(
                "backward was asked for a loss without a gradient: the model was called after model.eval() or under "
                "torch.no_grad(). Call model.train() before the training calls"
            )
        original(loss, **kwargs)

    def _clip_grad_norm_(
        self,
        original: Callable[..., Tensor],
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2,
    ) -> Tensor:
        members = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._loop is None or self._loop.is_here(members):
            return original(members, max_norm, norm_type=norm_type)
        self._accelerator.unscale_gradients()
        return self._loop.clip_norm(members, max_norm, norm_type)

    def _clip_grad_value_(
        self, original: Callable[..., None], parameters: Tensor | Iterable[Tensor], clip_value: float
    ) -> None:
        members = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if self._loop is None or self._loop.is_here(members):
            original(members, clip_value)
        else:
            self._accelerator.unscale_gradients()
            self._loop.clip_value(members, clip_value)

    def _save_model(self, original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(_Weights(model.state_dict()) if self._is_ours(model) else model, *args, **kwargs)

    def _free_memory(self, original: Callable[..., Any], *objects: Any) -> Any:
        self.bring_back()
        return original(*objects)

    def _end_training(self, original: Callable[[], None]) -> None:
        self.bring_back()
        original()

    def _save_state(self, models: Sequence[nn.Module], weights: Sequence[Any], output_dir: str) -> None:
        if self._loop is not None:
            (Path(output_dir) / _STATE_FILE).write_text(json.dumps(self._loop.state()), encoding="utf-8")

    def _load_state(self, models: Sequence[nn.Module], input_dir: str) -> None:
        file = Path(input_dir) / _STATE_FILE
        if self._loop is not None and file.exists():  # other checkpoints of accelerate fit as well
            self._loop.load_state(json.loads(file.read_text(encoding="utf-8")))


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
        check_scaler(accelerator.scaler)


def _renew(prepared: Optimizer) -> None:
    """Let an optimizer of accelerate, which calls the other's step as it was, call what that is now."""
    while isinstance(prepared, AcceleratedOptimizer):
        if prepared.scaler is not None:
            prepared.__setstate__({})
        prepared = prepared.optimizer


def _innermost(optimizer: Optimizer) -> Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
