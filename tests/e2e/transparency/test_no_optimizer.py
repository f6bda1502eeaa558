"""A module whose ``configure_optimizers`` returns None: its losses and gradients are those of one process."""

from typing import Any

import pytest

from tests.e2e.support import assert_same_run
from tests.grids import slow

from .test_own_steps import Model, fit


class Reading(Model):
    """Nobody zeroes its gradients, which add up."""

    def on_after_backward(self) -> None:
        self.seen += [float(parameter.grad.norm()) for parameter in self.parameters() if parameter.grad is not None]


class Zeroing(Reading):
    def on_train_batch_start(self, *_: Any) -> None:
        self.zero_grad()


@pytest.mark.parametrize("model", [Model, slow(Reading), Zeroing])
def test_it_runs_as_in_one_process(model: type[Model]) -> None:
    expected, found = (fit(lambda _: None, devices, model, max_epochs=2, max_steps=-1) for devices in (1, 3))
    assert_same_run(found, expected)
    assert found.module.seen == pytest.approx(expected.module.seen, rel=1e-4)
