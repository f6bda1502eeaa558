"""Where the blocks are between runs: in the model again, or with their workers, from where the next run goes on.

A model whose blocks stay with the workers is what it is during a run: its weights are read and written through the
workers that hold them, ``state_dict()``, ``trainer.save_checkpoint`` and calls of the model work, and the driver never
holds what nobody has asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from typing_extensions import override

from ..engine.device import HOST
from ..engine.errors import SkipPipeError
from ..engine.host_memory import available_bytes
from ..model.compiled import CompiledParts
from ..model.settings import PipelineSettings
from ..model.spread import Recovery, SpreadModel
from ..schedule import Timeline
from ..supervisor import supervised
from .optimizing import OptimizingStrategy

log = logging.getLogger(__name__)

Gather = Literal["auto", "always", "never"]
"""Whether a run ends with the blocks' weights in the model again."""

_SPARE: Final = 1.1
"""How much more than weights and optimizer state has to be free: a part of them is here twice for a moment."""
_STAYS: Final = (
    "the weights of %d blocks and their optimizer state (%s) stay on the workers, %s: the model reads them from there, "
    "and trainer.save_checkpoint, validate, test, predict and a further fit with this strategy go on from there; "
    "trainer.strategy.gather() brings them into the model"
)
_DIFFERS: Final = (
    "the blocks of {model} stay on the workers since the last run, and this one differs from it in {what}, for which "
    "they are handed out anew. Bring them into the model first: trainer.strategy.gather(){more}"
)


@dataclass(frozen=True, slots=True)
class Rest:
    """A model whose blocks stayed on the workers when a run had ended."""

    module: LightningModule
    made_of: Mapping[str, Any]  # Any: values to compare
    """What its pipeline follows from, by name."""
    precision: Precision
    """The one of the run, which clips and scales what is on the workers, too."""


class GatheringStrategy(OptimizingStrategy):
    """The part of the strategy that knows where the blocks are between runs; abstract.

    Args:
        drivers: How many processes run the Trainer.
        settings: The user's.
        gather: Whether runs end with the blocks' weights in the model.
        brings_workers: See :class:`DriversStrategy`.
        per_device: See :class:`DriversStrategy`.
    """

    def __init__(
        self,
        drivers: int,
        settings: PipelineSettings,
        gather: Gather,
        *,
        brings_workers: bool = False,
        per_device: int = 1,
    ) -> None:
        super().__init__(drivers, brings_workers=brings_workers, per_device=per_device)
        self.settings = settings
        """What the next run is set up with; callbacks may replace it before."""
        self._gather = gather
        self._rest: Rest | None = None
        self._is_told = False
        self._spread: SpreadModel | None = None
        self._compiled: CompiledParts | None = None
        self._recovery: Recovery | None = None
        self._timeline: Timeline | None = None
        self.is_probe = False
        """Whether the run is one of :meth:`check`, which leaves a launcher's workers where they are."""

    def gather(self) -> None:
        """Bring the blocks' weights, and the optimizer's state for them, from the workers into the model.

        Call it between runs; where they are in the model already it does nothing.

        Raises:
            SkipPipeError: A run is under way.
        """
        if (rest := self._rest) is not None:
            self._bring_back(over=True)
            _optimizers_to_device(self.optimizers, HOST)
            rest.module.cpu()
        elif self._spread is not None:
            raise SkipPipeError(
                "trainer.strategy.gather() brings the blocks back between runs, and one is under way; during a run the "
                "model reads them where they are (state_dict(), trainer.save_checkpoint)"
            )

    # ------------------------------------------------------------ end of a run

    @override
    def teardown(self) -> None:
        if self._spread is not None and self._rest is None and self._stays(self._spread):
            self._lie_down()
            assert self.accelerator is not None
            self.precision_plugin.teardown()
            self.accelerator.teardown()
            self.checkpoint_io.teardown()
        elif self._rest is None:
            self._bring_back(over=True)
            super().teardown()

    def _stays(self, spread: SpreadModel) -> bool:
        """Whether the blocks stay on the workers, now that a run is over."""
        module = self.lightning_module
        assert module is not None
        if self._gather == "always" or not spread.is_spread or not self._may_stay() or spread.pipeline.beyond_help:
            return False
        if module.trainer.state.status == TrainerStatus.INTERRUPTED:
            return False  # after a failure the model is whole
        if self._gather == "auto" and self._fits(spread):
            return False
        if not self._is_told:
            num_bytes, free = self._bytes_elsewhere(spread), _in_words(available_bytes())
            why = 'as gather="never" has it' if self._gather == "never" else f"since {free} are free here"
            level = logging.INFO if self._gather == "never" else logging.WARNING
            log.log(level, _STAYS, len(spread.remote_blocks), _in_words(num_bytes), why)
            self._is_told = True
        return True

    def _may_stay(self) -> bool:
        return not (self.is_probe or self._reason_to_gather())

    def _reason_to_gather(self) -> str:
        """Say why blocks cannot stay on the workers between runs; nothing when they can."""
        if self.drivers > 1:
            return f"each of drivers={self.drivers} ends its run by itself"
        if self.read_launcher() is not None:
            return "the launcher's ranks return from the Trainer's call when it is over, and hold nothing then"
        return "a driver that starts again under skippipe run looks for the whole result" if supervised() else ""

    def _check_gather(self) -> None:
        """Raise when blocks are to stay where they cannot."""
        if self._gather == "never" and (why := self._reason_to_gather()):
            raise SkipPipeError(f'gather="never" leaves the blocks on the workers, but {why}; use gather="always"')

    def _bytes_elsewhere(self, spread: SpreadModel) -> int:
        """Return how much the blocks' weights take on the workers, with the optimizer's state for them."""
        weights = sum(spread.pipeline.remote.block_bytes())
        return weights + (0 if self._remote is None else self._remote.estimate_state_bytes(weights))

    def _lie_down(self) -> None:
        """Leave the blocks on the workers, and the rest of the model on its device."""
        module, spread = self.lightning_module, self._spread
        assert module is not None
        assert spread is not None
        if self._open is not None:
            self._open.close()
            self._open = None
        self._rest = Rest(module, self._made_of(module), self.precision_plugin)
        spread.rest()

    def _made_of(self, module: LightningModule) -> dict[str, Any]:
        """Return what the pipeline of a run follows from, by the names that users know."""
        precision = self.precision_plugin
        return {
            "the module": module,
            "the strategy's settings": self.settings,
            "the number of devices": self.num_processes,
            "the device": self.root_device,
            "the precision": (type(precision), precision.precision),
            "its StageRecovery": self._recovery,
        }

    # ------------------------------------------------------------ begin of the next

    def _wake(self, module: LightningModule) -> bool:
        """Go on from what stayed on the workers; return whether anything did that this run can go on from."""
        if self._rest is None:
            return False
        now = self._made_of(module)
        differing = [name for name, value in self._rest.made_of.items() if now[name] != value]
        if not differing:
            if module.trainer.state.fn == TrainerFn.FITTING:
                self._retire_optimizer(self._rest)
            self._rest = None
            self._running().wake()
            return True
        before = type(self._rest.module).__name__
        if self._gather == "never" or not self._fits(self._running()):
            more = "" if self._gather == "never" else ", where there is memory for them"
            raise SkipPipeError(_DIFFERS.format(model=before, what=" and ".join(differing), more=more))
        self._bring_back(over=True)
        return False

    def _fits(self, spread: SpreadModel) -> bool:
        return available_bytes() > _SPARE * self._bytes_elsewhere(spread)

    def _retire_optimizer(self, rest: Rest) -> None:
        """Let another optimizer step what is on the workers: each fit makes its own."""
        remote = self._release_optimizer(rest.module, rest.precision)
        if remote is not None:
            remote.retire()

    # ------------------------------------------------------------ the way back

    def _bring_back(self, *, over: bool) -> None:
        """Make model and optimizer whole again on this driver, and free the workers."""
        if self._open is not None:  # workers that wait in a step answer nobody
            self._open.close()
            self._open = None
        rest, self._rest = self._rest, None
        try:
            module = self.lightning_module if rest is None else rest.module  # another may be about to run
            remote = self._release_optimizer(module, self.precision_plugin if rest is None else rest.precision)
            if remote is not None:
                remote.detach()
        finally:
            self._bring_blocks_back()
        continuation, self._continuation = self._continuation, None
        if continuation is not None:
            continuation.detach(over=over)

    def _bring_blocks_back(self) -> None:
        try:
            if self._spread is not None:
                self._timeline = self._spread.timeline or self._timeline
                self._spread.bring_back(keep=self._continuation is not None)
        finally:
            self._spread = None
            self._forget_run()
            if self._compiled is not None:
                self._compiled.restore()
                self._compiled = None

    def _forget_run(self) -> None:
        """Forget what was found out about the steps of a run."""
        raise NotImplementedError


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
