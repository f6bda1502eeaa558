"""What a LightningModule overrides of the loop around its step is exact, or refused."""

from typing import Any

import pytest
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.models import mlp
from tests.e2e.modules import Classifier, loader, points
from tests.e2e.support import Run, assert_same_run, train
from tests.grids import all_slow_but, slow


class Base(Classifier):
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


class ZeroesWithTheModule(Base):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.zero_grad()


class ScalesTheLoss(Base):
    def backward(self, loss: Any) -> None:
        (loss * 3).backward()


class RunsTheClosureTwice(Base):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        closure()
        optimizer.step()


class SkipsSteps(Base):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.step(closure)
        else:
            closure()


class WarmsUp(Base):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        optimizer.step(closure)
        optimizer.param_groups[0]["lr"] = 0.1 * (batch_idx + 1) / 4


class ChangesTheRate(Base):
    def on_before_zero_grad(self, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.9


class Clips(Base):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


class ClipsByValue(Base):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.001, gradient_clip_algorithm="value")


class StepsItsScheduler(Base):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": LambdaLR(optimizer, lambda step: 0.9**step), "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        scheduler.step()


class ZeroesInItsStep(Base):
    def training_step(self, batch: Any) -> Any:
        loss = super().training_step(batch)
        self.optimizers().zero_grad()
        return loss


def run(kind: type[Classifier], devices: int, accumulate: int, num_microbatches: int = 4) -> Run:
    settings = {"num_microbatches": num_microbatches, "verbose": False} if devices > 1 else None
    options = {"max_steps": 3, "accumulate_grad_batches": accumulate}
    return train(lambda: kind(mlp()), loader(points(48)), devices, settings, **options)


EXACT = (
    ZeroesWithTheModule,
    ScalesTheLoss,
    RunsTheClosureTwice,
    SkipsSteps,
    WarmsUp,
    ChangesTheRate,
    Clips,
    ClipsByValue,
    StepsItsScheduler,
)


@pytest.mark.parametrize("accumulate", [slow(1), 2])
@pytest.mark.parametrize(
    "kind", all_slow_but(EXACT, ScalesTheLoss, RunsTheClosureTwice, SkipsSteps, WarmsUp, Clips, StepsItsScheduler)
)
def test_overrides(kind: type[Classifier], accumulate: int) -> None:
    assert_same_run(run(kind, 3, accumulate), run(kind, 1, accumulate))


def test_gradients_that_are_zeroed_inside_of_a_step() -> None:
    assert_same_run(run(ZeroesInItsStep, 3, 1), run(ZeroesInItsStep, 1, 1))  # those of the last step: without effect
    with pytest.raises(SkipPipeError, match=r"zero_grad\(\) was called inside of a step"):
        run(ZeroesInItsStep, 3, 2)


class ZeroesInAHook(Base):
    def on_before_backward(self, loss: Any) -> None:
        self.optimizers().zero_grad()


def test_a_hook_may_zero_them() -> None:
    assert_same_run(run(ZeroesInAHook, 3, 2), run(ZeroesInAHook, 1, 2))
