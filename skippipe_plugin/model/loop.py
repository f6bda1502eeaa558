"""One model of a training loop: spread, called, stepped with its optimizer, clipped, brought back.

What loops of accelerate and plain ones share. The loop stays as it is: it calls the model, back-propagates, steps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ..driver.capture.remote import check_is_here, is_remote
from ..driver.devices import Devices
from ..driver.loss_scaling import unscale_everywhere, unscale_locally
from ..driver.moving import MoveEvent
from ..driver.optimizer import RemoteOptimizer, to_device
from ..driver.recovery.report import RecoveryEvent
from ..engine.device import free_bytes, own_place
from ..engine.errors import SkipPipeError
from ..job.job import DriverJob, driver_job
from ..job.launcher import Launcher
from ..partition import find_blocks
from .backwards import Backwards
from .calls import ModelCalls
from .compiled import CompiledParts, originals
from .loop_config import SkipPipeConfig
from .panel import start_panel
from .spread import SpreadModel
from .whole import WholeModel

log = logging.getLogger(__name__)

_DEFAULT_STAGES: Final = 4


class LoopModel:
    """A loop's model, from :meth:`spread` until :meth:`bring_back`.

    Args:
        model: What the loop calls; a compiled model, for instance.
        config: The user's settings.
        job: Where workers come from.
        num_stages: How many block stages to make.
        device: Where what is not in the blocks is computed.
        events: Gets the recoveries and moves.
        scale: Tells what the loop's backward of a loss that the model returns is expected to bring, without a scaler.
        scaler: Scales the losses, if the loop has one.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SkipPipeConfig,
        *,
        job: DriverJob,
        num_stages: int,
        device: torch.device,
        events: list[RecoveryEvent | MoveEvent],
        scale: Callable[[], float] = lambda: 1.0,
        scaler: GradScaler | None = None,
    ) -> None:
        self.model = model
        self.blocks = SpreadModel(
            config,
            num_stages=num_stages,
            job=job,
            rank=0,
            devices=Devices(device, own_place(), per_device=config.network.workers_per_device),
        )
        self._config = config
        self._device = device
        self._events = events
        self._scale = scale if scaler is None else lambda: scale() * scaler.get_scale()
        self._scaler = scaler
        self._calls: ModelCalls | None = None
        self._backwards: Backwards | None = None
        self._whole: WholeModel | None = None
        self._compiled: CompiledParts | None = None
        self._optimizer: Optimizer | None = None
        self._remote: RemoteOptimizer | None = None

    @property
    def calls(self) -> ModelCalls:
        """What answers the loop's calls of the model."""
        assert self._calls is not None, "spread() comes first"
        return self._calls

    # ------------------------------------------------------- spread and bring back

    def spread(self, say: Callable[[str], None]) -> None:
        """Hand the blocks over to workers; ``say`` gets the start panel."""
        model, config, policy = self.model, self._config, self._config.recovery
        root = getattr(model, "_orig_mod", model)
        check_is_here(root)
        stack = find_blocks(root, config.blocks)
        blocks, described = originals(stack.blocks), str(stack)
        self._compiled = CompiledParts(model, blocks)
        recovery = None if policy is None else (config.fit_recovery(policy), self._note)
        self.blocks.spread(root, blocks, compilation=self._compiled.compilation, recovery=recovery)
        if config.verbose:
            say(str(start_panel(self.blocks, root, blocks, described)))
        rewinds = policy is not None
        calls = ModelCalls(
            self.blocks,
            model,
            self._device,
            rewinds=rewinds,
            weight=config.microbatch_weight,
            scale=self._scale,
            is_scaled=self._scaler is not None,
        )
        self._calls = calls
        self._whole = WholeModel(model, root, self.blocks, calls)
        step = calls.open_step
        self._backwards = Backwards(step.begin_backward, step.complete, step.fail)
        self._backwards.follow()

    def bring_back(self) -> None:
        """Make model and optimizer whole again in this process; the workers wait for the next model."""
        if self._backwards is not None:
            self._backwards.leave()
        if self._calls is not None:
            self._calls.close()
        if self._whole is not None:
            self._whole.remove()
        try:
            if self._scaler is not None:
                unscale_locally(self._scaler)
            if self._remote is not None:
                self._remote.detach()
        finally:
            blocks, optimizer = self.blocks.remote_blocks, self._optimizer
            self._remote = self._optimizer = self._calls = self._whole = self._backwards = None
            self.blocks.bring_back()
            _move_home(blocks, optimizer, self._device)
            if self._compiled is not None:
                self._compiled.restore()
            self._compiled = None

    def _note(self, event: RecoveryEvent | MoveEvent) -> None:
        self._events.append(event)
        log.warning("%s", event)

    # ------------------------------------------------------------- optimizer

    def take_optimizer(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Extend an optimizer of the model to the workers, with the ``state`` that it has already.

        Raises:
            SkipPipeError: There is one already, or the workers cannot have parts of this one.
        """
        own = {id(parameter) for parameter in self.model.parameters()}
        if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            return
        if optimizer is self._optimizer:
            return
        if self._optimizer is not None:
            raise SkipPipeError("a second optimizer of the model: a pipeline steps one; give it parameter groups")
        calls = self.calls
        self._optimizer = optimizer
        self._remote = RemoteOptimizer(
            self.blocks.pipeline,
            optimizer,
            begun=functools.partial(calls.open_step.settle, "optimizer.step()"),
            ended=calls.count_optimizer_step,
        )
        self.blocks.pipeline.gradients.optimizers = lambda: (optimizer,)
        if self._scaler is not None:
            unscale_everywhere(self._scaler, self._remote)
        if state["state"]:
            self._remote.load_state_dict(state)

    def is_here(self, parameters: Iterable[Tensor]) -> bool:
        """Whether all of some parameters are in this process, so that their gradients are an ordinary matter."""
        return not any(map(is_remote, parameters))

    def clip_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of these parameters, which include all on workers, by their common norm; return it.

        Only partial norms travel.

        Raises:
            SkipPipeError: They do not include all on workers.
        """
        local, remote = self._to_clip(parameters)
        return torch.tensor(remote.clip_norm(float(max_norm), float(norm_type), local))

    def clip_value(self, parameters: Iterable[Tensor], clip_value: float) -> None:
        """Clip each element of the gradients of these parameters, which include all on workers.

        Raises:
            SkipPipeError: They do not include all on workers.
        """
        local, remote = self._to_clip(parameters)
        torch.nn.utils.clip_grad_value_(local, clip_value)
        remote.clip_value(float(clip_value))

    def _to_clip(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], RemoteOptimizer]:
        """Return those of the parameters that are here, and the optimizer of the others."""
        members = list(parameters)
        self.calls.open_step.settle("the clipping of gradients")
        asked = {id(parameter) for parameter in members}
        groups = self._optimizer.param_groups if self._optimizer is not None else ()
        trained = [p for group in groups for p in group["params"] if is_remote(p) and p.requires_grad]
        left_out = sum(id(parameter) not in asked for parameter in trained)
        if self._remote is None or left_out:
            raise SkipPipeError(
                f"gradients cannot be clipped without {left_out} of the {len(trained)} parameters that the workers "
                "train: pass model.parameters(), and let the pipeline have the optimizer first "
                "(accelerate: accelerator.prepare(model, optimizer))"
            )
        return [parameter for parameter in members if not is_remote(parameter)], self._remote

    # ------------------------------------------------------------- resuming

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on with, beside model and optimizer; JSON can hold it."""
        factors = list(self.blocks.pipeline.gradients.lr_factors_of_blocks.items())
        return self.calls.state() | {"lr_factors": factors}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self.blocks.pipeline.gradients.lr_factors_of_blocks = dict(map(tuple, state["lr_factors"]))
        self.calls.load_state(state)


def _move_home(blocks: Iterable[nn.Module], optimizer: Optimizer | None, device: torch.device) -> None:
    """Move what came back from workers to where the rest of the model is, if there is room."""
    if device.type == "cpu":
        return
    parts = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
    states = [] if optimizer is None else [optimizer.state.get(tensor, {}) for tensor in parts]
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    needs, free = sum(tensor.nbytes for tensor in (*parts, *moments)), free_bytes(device)
    if free is not None and needs > free:
        log.warning(
            "the blocks stay on the host, while the rest of the model is on %s: they have %.1f GB, and %.1f are free",
            *(device, needs / 1e9, free / 1e9),
        )
        return
    for block in blocks:
        block.to(device)
    if optimizer is not None:
        to_device(optimizer, device)


def open_job(
    config: SkipPipeConfig, device: torch.device, launcher: Launcher | None, num_processes: int | None
) -> tuple[DriverJob, int]:
    """Return this process's job, whose workers are being started, and how many block stages to make.

    Args:
        config: The user's settings.
        device: Where what is not in the blocks is computed.
        launcher: What started this process beside its workers; None: workers are started here.
        num_processes: How many processes the launcher started.
    """
    num_stages = _choose_num_stages(config, device, num_processes)
    job = driver_job(config.network, 1, launcher)
    num_workers = (num_stages - config.driver_stage) * config.replicas
    job.prepare(num_workers + (config.recovery.spares if config.recovery is not None else 0))
    return job, num_stages


def _choose_num_stages(config: SkipPipeConfig, device: torch.device, num_processes: int | None) -> int:
    if num_processes is not None:
        return config.stages_of(num_processes)
    if config.num_stages is not None:
        return config.num_stages
    num_devices = own_place().num_devices * config.network.workers_per_device if device.type != "cpu" else 0
    return config.stages_of(num_devices) if num_devices > 1 else _DEFAULT_STAGES
