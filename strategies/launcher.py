"""What happens when the Trainer launches ``fit``, ``validate``, ``test`` or ``predict``.

On a driver the Trainer simply runs. On the other ranks of an external launcher nothing of it runs: the rank serves as
a worker until its driver is done, and then returns the driver's results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from typing_extensions import override

if TYPE_CHECKING:
    from .skippipe import SkipPipeStrategy


class SkipPipeLauncher(_Launcher):
    """Runs the Trainer's function on drivers, and a worker in its place elsewhere."""

    def __init__(self, strategy: SkipPipeStrategy) -> None:
        self._strategy = strategy

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return True

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Run ``function``; see :class:`~lightning.pytorch.strategies.launchers.launcher._Launcher`."""
        return self._strategy.launched(lambda: function(*args, **kwargs), trainer)

    @override
    def kill(self, signum: Any) -> None:
        """Nothing to kill: workers end with their driver."""
