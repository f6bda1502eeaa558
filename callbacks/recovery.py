"""StageRecovery: a run that goes on when a worker is lost. Policy and report; the mechanism is the driver's."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from ..checked import checked
from ..driver.capture.remote import is_remote
from ..driver.moving import MoveEvent
from ..driver.recovery.policy import RecoveryPolicy, WhileMissing
from ..driver.recovery.report import RecoveryEvent
from ..recovery import RebuildRule
from .common import strategy_of, to_loggers

log = logging.getLogger(__name__)


@checked()
class StageRecovery(Callback):
    """Replace workers that are lost, without a checkpoint; the batch under way is repeated.

    A worker is lost when its process ends, its link breaks, or it gives no sign of life for ``heartbeat_s``. Every
    other rank leaves what it was doing at once. The new worker gets the stage from another replica, with optimizer
    state, so that nothing changes; where there is none, from the neighbouring stages (`CheckFree
    <https://arxiv.org/abs/2506.15461>`_) with a fresh optimizer. An exception in a worker is an error of the model and
    ends the run as ever. A worker that gets SIGTERM hands its stages over after the step.

    With ``elastic`` the number of stages follows the workers, between two steps: those that join by hand (``skippipe
    worker --join``) beyond the wanted spares make further stages, and when workers leave politely with nobody to take
    over, fewer stages are made. Blocks move with weights, accumulated gradients and optimizer state; microbatches,
    batch and gradient scale stay, so results do not change.

    Logs ``recovery/count``, ``recovery/seconds`` and ``recovery/steps_around`` for each loss, and
    ``recovery/num_stages`` and ``recovery/move_seconds`` for each change of the number of stages.
    The step after a loss is measured, and :class:`PipelineMonitor` draws it with a mark for each new worker.

    Args:
        spares: How many idle workers are kept ready on the driver's host. Without one, a replacement must first start
            (seconds).
        rule: The weights of the two neighbours in the average: their gradients' norms (``"norm"``, as CheckFree's
            code), the squares of those (``"squared"``), equal ones (``"mean"``); ``"copy"`` copies the stage before.
        lr_factor: What the learning rate of a stage that was rebuilt from neighbours is multiplied with from then on,
            once however often it is lost.
        while_missing: Whether steps wait for a replacement that is not there yet (``"wait"``), or paths leave the
            stage out meanwhile (``"skip"``). With a skip ratio they always do, and where another replica is
            left it takes over, which is exact. Validation and checkpoints always wait.
        swap_ends: Exchange the first two and the last two stages for every second microbatch (CheckFree+), so that
            the copy of a neighbour is a good replacement for the first or last stage too. Such training is not exact.
        heartbeat_s: Seconds without a sign of life after which a worker counts as lost.
        elastic: Whether the number of stages follows the workers.

    Example:
        >>> from skippipe_plugin.callbacks import StageRecovery
        >>> StageRecovery(spares=-1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        skippipe_plugin.checked.SettingError: spares=-1 is out of range; it is a whole number of ...
    """

    def __init__(
        self,
        *,
        spares: int = 1,
        rule: RebuildRule = "norm",
        lr_factor: float = 1.1,
        while_missing: WhileMissing = "wait",
        swap_ends: bool = False,
        heartbeat_s: float = 10.0,
        elastic: bool = False,
    ) -> None:
        super().__init__()
        self.policy = RecoveryPolicy(
            spares=spares,
            rule=rule,
            lr_factor=lr_factor,
            while_missing=while_missing,
            swap_ends=swap_ends,
            heartbeat_s=heartbeat_s,
            elastic=elastic,
        )
        self.events: list[RecoveryEvent] = []
        """The losses and departures, in order."""
        self.moves: list[MoveEvent] = []
        """The changes of the number of stages, in order."""
        self._trainer: Trainer | None = None
        self._trains = False
        self._lr_factors: dict[int, float] = {}  # by block: a run may go on with another number of stages

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        strategy_of(trainer, self).use_recovery(self.policy, self._note)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy_of(trainer, self).lr_factors_of_blocks = self._lr_factors
        self._trains = True
        frozen = [
            name
            for name, parameter in pl_module.named_parameters()
            if is_remote(parameter) and not parameter.requires_grad
        ]
        if frozen and strategy_of(trainer, self).settings.replicas == 1:
            warnings.warn(
                f"{len(frozen)} frozen parameters ({frozen[0]}, ...) are on workers: averages of neighbours are no "
                "good replacement for pretrained weights; give the stages replicas (replicas=2)",
                stacklevel=2,
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lr_factors = strategy_of(trainer, self).lr_factors_of_blocks
        self._trains = False

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._trains and self._trainer is not None and self._trainer.training:
            self._lr_factors = strategy_of(self._trainer, self).lr_factors_of_blocks
        return {"lr_factors": self._lr_factors}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lr_factors = dict(state_dict["lr_factors"])

    def _note(self, event: RecoveryEvent | MoveEvent) -> None:
        log.warning("%s", event)
        if isinstance(event, MoveEvent):
            self.moves.append(event)
            metrics = {"recovery/num_stages": float(event.after), "recovery/move_seconds": event.seconds}
        else:
            self.events.append(event)
            metrics = {
                "recovery/count": float(len(self.events)),
                "recovery/seconds": event.seconds,
                "recovery/steps_around": float(event.steps_around),
            }
        assert self._trainer is not None
        to_loggers(self._trainer, metrics)
        if isinstance(event, RecoveryEvent):
            strategy_of(self._trainer, self).measure_step()  # its timeline shows what came of it
