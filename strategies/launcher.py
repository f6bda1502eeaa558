"""What happens when the Trainer launches ``fit``, ``validate``, ``test`` or ``predict``.

On a driver the Trainer simply runs. On the other ranks of an external launcher nothing of it runs: the rank serves as
a worker until its driver is done, and then returns the driver's results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override


class SkipPipeLauncher(_Launcher):
    """Runs the Trainer's function on drivers, and a worker in its place elsewhere.

    Args:
        launched: Called with the Trainer's function and the Trainer; decides which of the two this process is.
    """

    def __init__(self, launched: Callable[[functools.partial[Any], Trainer | None], Any]) -> None:
        self._launched = launched

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run ``function``; see :class:`~lightning.pytorch.strategies.launchers.launcher._Launcher`."""
        return self._launched(functools.partial(function, *args, **kwargs), trainer)

    @override
    def kill(self, signum: Any) -> None:
        """Nothing to kill: workers end with their driver."""


def collect_results(result: Any, trainer: Trainer | None) -> dict[str, Any]:
    """Return what the worker ranks of a launcher shall know when the driver's call is over."""
    if trainer is None:
        return {"result": result}
    return {
        "result": move_data_to_device(result, "cpu"),
        "callback_metrics": move_data_to_device(dict(trainer.callback_metrics), "cpu"),
        "best_model_path": getattr(trainer.checkpoint_callback, "best_model_path", None),
    }


def apply_results(results: dict[str, Any], trainer: Trainer | None) -> Any:
    """Make a worker rank's Trainer look as if it had run; return what the driver's call returned."""
    if trainer is not None:
        trainer.callback_metrics.update(results["callback_metrics"])
        checkpoint: Any = trainer.checkpoint_callback  # Any: only ModelCheckpoint has a best model
        if results["best_model_path"] is not None and hasattr(checkpoint, "best_model_path"):
            checkpoint.best_model_path = results["best_model_path"]
        trainer.state.status = TrainerStatus.FINISHED
        trainer.state.stage = None
    return results["result"]
