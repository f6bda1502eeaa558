"""Steps of a module that goes back and steps its optimizers itself (``automatic_optimization = False``).

They run as in one process, once on the whole batch: only their calls of the blocks go through the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule

from ..driver.capture.growing import sample_counts
from ..model.backwards import Backwards
from ..model.open_calls import OpenCalls
from ..model.open_step import OpenStep
from ..model.spread import SpreadModel


class ManualSteps:
    """Runs them.

    Args:
        spread: The module's blocks.
        module: The user's.
        device: The driver's.
        repeats: Whether interrupted calls of the blocks are repeated.
    """

    def __init__(self, spread: SpreadModel, module: LightningModule, device: torch.device, *, repeats: bool) -> None:
        self._spread = spread
        self._open = OpenStep(spread, module, device)
        self._calls = OpenCalls(spread, self._open, repeats=repeats)

    def run(self, step: Callable[[], Any], batch: Any, seed: int, num_steps: int) -> Any:
        """Run a step, and return what it returns.

        Args:
            step: Does it.
            batch: The user's.
            seed: Of the randomness in the blocks.
            num_steps: The optimizer steps so far.
        """
        self._calls.begin(sample_counts(batch), seed, num_steps)
        backwards = Backwards(self._open.begin_backward, self._open.complete, self._open.fail)
        backwards.follow()
        try:
            with self._spread.pipeline.open_to(self._calls):
                result = step()
            self._open.settle("the end of training_step")
        except BaseException:
            self._open.close()
            raise
        finally:
            backwards.leave()
        return result

    def settle(self, why: str) -> None:
        """Let no call wait for its backward any longer: what comes needs the workers, and ``why`` says what that is."""
        self._open.settle(why)

    def close(self) -> None:
        """Give up what waits."""
        self._open.close()
