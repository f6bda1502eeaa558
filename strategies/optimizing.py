"""The Trainer's optimizer, which steps what is on the workers too: what Lightning does to it reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer
from typing_extensions import override

from ..driver.optimizer import RemoteOptimizer, to_device
from ..model.spread import SpreadModel
from .checks import check_replaceable, check_unreplaced, far_reaching, same_objects
from .clipping import clip_everywhere, clip_locally
from .continuation import Continuation
from .drivers import DriversStrategy
from .open_steps import OpenSteps
from .scaling import scale_everywhere, scale_locally
from .zeroing import zero_everywhere, zero_locally


class OptimizingStrategy(DriversStrategy):
    """The part of the strategy that knows of the optimizer; abstract."""

    def __init__(self, drivers: int, *, brings_workers: bool = False, per_device: int = 1) -> None:
        super().__init__(drivers, brings_workers=brings_workers, per_device=per_device)
        self._remote: RemoteOptimizer | None = None
        """The one that steps what is on the workers."""
        self._open: OpenSteps | None = None
        """Runs steps as in one process but for their calls of the blocks, where they need that."""
        self._continuation: Continuation | None = None

    def _running(self) -> SpreadModel:
        raise NotImplementedError

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.optimizers and not isinstance(self.optimizers[0], _MockOptimizer):  # configure_optimizers made one
            self._remote = RemoteOptimizer(
                self._running().pipeline, far_reaching(self.optimizers), begun=self._settle_for_step
            )
            self._running().pipeline.gradients.optimizers = lambda: self.optimizers
            zero_everywhere(self.lightning_module, self._running().pipeline.gradients)
            if self._continuation is not None:
                self._continuation.attach(self._running(), self._remote)

    def _settle_for_step(self) -> None:
        if self._open is not None:
            self._open.settle("optimizer.step()")

    @property
    @override
    def optimizers(self) -> list[Optimizer]:
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        """Use others; while a model is spread, the parts on the workers become parts of the new one."""
        before, self._optimizers = self._optimizers, optimizers
        self._lightning_optimizers = [LightningOptimizer._to_lightning_optimizer(each, self) for each in optimizers]
        remote = self._remote
        if remote is None:
            return
        if not same_objects(optimizers, before):  # Lightning sets the same again
            check_replaceable(optimizers, before, is_continued=self._continuation is not None)
            remote = self._remote = remote.replaced_by(optimizers[0])
        self._reach_workers(remote)

    @override
    def setup_precision_plugin(self) -> None:
        super().setup_precision_plugin()
        if self._remote is not None:
            self._reach_workers(self._remote)

    def _reach_workers(self, remote: RemoteOptimizer) -> None:
        """Let what Lightning does to gradients reach those on workers."""
        # What self.optimizers() returns has a zero_grad of its own, which sees this driver's parameters only.
        wrapper = next(each for each in self._lightning_optimizers if each.optimizer is remote.optimizer)
        wrapper.__dict__["zero_grad"] = remote.optimizer.zero_grad
        clip_everywhere(self.precision_plugin, remote)
        scale_everywhere(self.precision_plugin, remote)

    def _check_optimizers(self) -> None:
        """Raise when the list of optimizers is another than Lightning and the workers know."""
        check_unreplaced(self.optimizers, [each.optimizer for each in self._lightning_optimizers])

    def _release_optimizer(self, module: LightningModule | None, precision: Precision) -> RemoteOptimizer | None:
        """Let Lightning's part step what is on this driver alone; return what steps the rest, for the caller to end.

        Args:
            module: Whose run it was.
            precision: What clips and scales.
        """
        remote, self._remote = self._remote, None
        if remote is None:
            return None
        clip_locally(precision)
        scale_locally(precision)
        zero_locally(module)
        for wrapper in self._lightning_optimizers:
            wrapper.__dict__.pop("zero_grad", None)
        return remote

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if self._remote is None or optimizer is not self._remote.optimizer:
            return super().optimizer_state(optimizer)
        return self._remote.state_dict()

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if self._remote is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            is_remote = optimizer is self._remote.optimizer
            (self._remote if is_remote else optimizer).load_state_dict(state)
            to_device(optimizer, self.root_device)
