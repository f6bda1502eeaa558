"""A pipeline for a plain torch loop, without Lightning and accelerate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ..checked import checked
from ..driver.loss_scaling import check_scaler
from ..driver.moving import MoveEvent
from ..driver.recovery.report import RecoveryEvent
from ..engine.errors import SkipPipeError
from ..job.job import worker_job
from ..job.launched import read_launcher
from ..job.launcher import Launcher
from ..worker import end_with_driver
from .loop import LoopModel, open_job
from .loop_config import SkipPipeConfig
from .spread import SpreadModel

log = logging.getLogger(__name__)


@checked()
class TorchPipeline:
    """Runs a module as a pipeline while the context is open; the loop that calls and trains it stays as it is.

    The module stays the same object, and so does its optimizer. In between, its blocks are on workers, which this
    process starts. Under a launcher (``torchrun``) the other processes become the workers when they enter the context:
    there they serve until the first process ends, and then end too.

    Args:
        model: The module. What is not in its blocks stays on its device.
        optimizer: What trains it, if it is trained: one optimizer, made from ``model.parameters()`` before.
        config: Settings; by default those of the environment, see :meth:`SkipPipeConfig.from_environment`.
        scaler: What scales the losses of the loop, if it trains in float16. A pipeline that knows it unscales gradients
            where they are, and takes losses in :meth:`run`.

    Example:
        ::

            model = MyModule()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            with TorchPipeline(model, optimizer, SkipPipeConfig(num_stages=4)) as pipeline:
                for inputs, targets in loader:
                    loss = criterion(model(inputs), targets)
                    loss.backward()
                    pipeline.clip_grad_norm_(1.0)
                    optimizer.step()
                    optimizer.zero_grad()

    Raises:
        SkipPipeError: The module is wrapped, or this process is one of several that train it already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        config: SkipPipeConfig | None = None,
        *,
        scaler: GradScaler | None = None,
    ) -> None:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            raise SkipPipeError(
                f"the model is wrapped in {type(model).__name__}, which distributes it itself; pass the module inside "
                "of it (model.module), in one process"
            )
        if scaler is not None:
            check_scaler(scaler)
        self.config = config if config is not None else SkipPipeConfig.from_environment()
        self.events: list[RecoveryEvent | MoveEvent] = []
        """The recoveries so far, in order."""
        self._model = model
        self._optimizer = optimizer
        self._scaler = scaler
        self._loop: LoopModel | None = None

    # ----------------------------------------------------------------- life

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Hand the blocks over to workers; in a launcher's other processes: serve as one, and end the process."""
        if self._loop is not None:
            return
        launcher, num_processes = read_launcher(os.environ)
        if num_processes is not None:
            self.config.stages_of(num_processes)  # what does not fit is an error in every process
        _check_alone(launcher)
        if launcher is not None and launcher.rank > 0:
            worker_job(launcher, self.config.network).serve_until_exit()
            raise SystemExit(0)
        end_with_driver()
        device = _device_of(self._model)
        job, num_stages = open_job(self.config, device, launcher, num_processes)
        loop = self._loop = LoopModel(
            self._model,
            self.config,
            job=job,
            num_stages=num_stages,
            device=device,
            events=self.events,
            scaler=self._scaler,
        )
        try:
            loop.spread(log.info)
            if self._optimizer is not None:
                loop.take_optimizer(self._optimizer, self._optimizer.state_dict())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Bring weights and optimizer state back into this process; the workers wait for the next pipeline."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.bring_back()

    # ---------------------------------------------------------------- steps

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what ``function``, which calls the model, would return for a whole batch.

        It runs once for each microbatch. When it returns a loss (a scalar, an entry ``"loss"``, a tuple that begins
        with a scalar), a microbatch goes back as soon as it has come forward, so that fewer of them are held than
        with ``model(inputs)`` and a loss in the loop. As ever, ``loss.backward()`` adds the gradients.

        Args:
            function: What is computed for a batch, such as ``lambda x, y: criterion(model(x), y)``.
            args: The batch, which is cut into microbatches along its first dimension.
            kwargs: The same, by name.

        Raises:
            SkipPipeError: The results of the batch do not follow from those of microbatches; or the optimizer trains
                something that is no part of the model.
        """
        loop = self._running()
        own = {id(parameter) for parameter in self._model.parameters()}
        groups = self._optimizer.param_groups if self._optimizer is not None else ()
        foreign = sum(id(parameter) not in own for group in groups for parameter in group["params"])
        if foreign and torch.is_grad_enabled() and self._model.training:
            raise SkipPipeError(
                f"the optimizer trains {foreign} parameters that are no part of the model, whose gradients run() "
                "cannot keep apart: make what they belong to a submodule of the model, or call the model in the loop "
                "and compute the loss from what it returns"
            )
        return loop.calls.run(function, args, kwargs)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradients of the whole model as ``torch.nn.utils.clip_grad_norm_`` does; return their norm.

        That function works as well; it fetches all gradients, where here only partial norms travel.
        """
        return self._running().clip_norm(self._model.parameters(), max_norm, norm_type)

    # ------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with, beside the ``state_dict()`` of model and optimizer.

        It is small: the seeds of dropout in the blocks and skip ratios over time follow from it.
        """
        return self._running().state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the run that called :meth:`state_dict` was."""
        self._running().load_state(state_dict)

    # ---------------------------------------------------------------- views

    @property
    def spread(self) -> SpreadModel:
        """The model's blocks: timelines, measured costs, the planner of paths.

        Raises:
            SkipPipeError: The pipeline is not open.
        """
        return self._running().blocks

    @property
    def worker_pids(self) -> dict[int, int]:
        """By rank: the process ids of the workers on this host."""
        return self._loop.blocks.worker_pids if self._loop is not None else {}

    def _running(self) -> LoopModel:
        if self._loop is None:
            raise SkipPipeError("the pipeline is not open: call this inside of `with TorchPipeline(model, ...)`")
        return self._loop


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def _check_alone(launcher: Launcher | None) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        others = "" if launcher is None else ", and make no process group: the pipeline makes its own"
        raise SkipPipeError(
            f"torch.distributed is set up for {dist.get_world_size()} processes, each of which would train on its "
            f"share of the data; a pipeline's loop runs in one process and sees all of it. Start one process{others}"
        )
