"""Tensors with a gradient that no module and no optimizer of the Trainer's has: in lists, closures, of the step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.e2e.support import assert_same_run, train
from tests.grids import all_slow_but

from ..modules import STEPS
from .test_own_parameters import batches


class Model(LightningModule):
    """Four blocks and a head; ``leaf`` is stepped by the module itself, and ``seen`` is what its gradients were."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 4)
        held = torch.zeros(8, requires_grad=True)
        self.leaf: Callable[[], Tensor] = lambda: held  # in a closure no walk finds it
        self.seen: list[Tensor | None] = []

    def hidden(self, rows: Tensor) -> Tensor:
        for block in self.blocks:
            rows = block(rows)
        return rows + self.leaf().to(rows.device)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def note(self) -> None:
        gradient = self.leaf().grad
        self.seen.append(None if gradient is None else gradient.detach().clone())

    def step(self) -> None:
        leaf = self.leaf()
        if leaf.grad is not None:
            with torch.no_grad():
                leaf -= 0.5 * leaf.grad

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()
        self.leaf().grad = None

    def on_before_backward(self, loss: Tensor) -> None:
        self.note()

    def on_after_backward(self) -> None:
        self.note()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.step()


class InFront(Model):
    def hidden(self, rows: Tensor) -> Tensor:
        rows = rows + self.leaf().to(rows.device)
        for block in self.blocks:
            rows = block(rows)
        return rows


class OnBothSides(Model):
    def hidden(self, rows: Tensor) -> Tensor:
        return super().hidden(rows + self.leaf().to(rows.device))


class SteppedEarly(Model):
    """Steps as soon as the gradient is there, and zeroes it where the next step begins."""

    def on_after_backward(self) -> None:
        self.note()
        self.step()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None: ...


class Gathered(Model):
    """Never zeroes: a step adds to what is there."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()


class Hooked(Model):
    """Clips the whole gradient, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf().register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))
        self.leaf().register_post_accumulate_grad_hook(lambda leaf: self.note())


class Probe(Model):
    """A layer in a list that learns beside, by an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        probe = nn.Linear(8, 4)
        self.beside = [probe, torch.optim.SGD(probe.parameters(), lr=0.1)]
        self.leaf = lambda: probe.weight

    def hidden(self, rows: Tensor) -> Tensor:
        for block in self.blocks:
            rows = block(rows)
        return rows

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden = self.hidden(batch[0])
        probed = self.beside[0].to(hidden.device)(hidden.detach())
        return nn.functional.cross_entropy(self.head(hidden), batch[1]) + nn.functional.cross_entropy(probed, batch[1])

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()
        self.beside[1].zero_grad()

    def step(self) -> None:
        self.beside[1].step()


class Late(Probe):
    """Learns beside only when there were many microbatches without."""

    def __init__(self) -> None:
        super().__init__()
        self.later, self.beside = self.beside, []

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.beside = self.later if self.global_step >= STEPS else []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if self.beside:
            return super().training_step(batch, index)
        return nn.functional.cross_entropy(self.head(self.hidden(batch[0])), batch[1])

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()
        self.later[1].zero_grad()

    def step(self) -> None:
        self.later[1].step()


class OfTheStep(Model):
    """The batch itself: a leaf that each step makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = lambda: self.rows

    def hidden(self, rows: Tensor) -> Tensor:
        self.rows = hidden = rows.detach().clone().requires_grad_()
        for block in self.blocks:
            hidden = block(hidden)
        return hidden + self.rows.square()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.note()

    def step(self) -> None: ...


STRATEGIES: list[dict[str, Any]] = [
    {"num_microbatches": 4},
    {"microbatches": "stack"},
    {"schedule": "gpipe", "driver_stage": True},
]
OPTIONS: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}]
MODELS: list[Callable[[], Model]] = [
    Model,
    InFront,
    OnBothSides,
    SteppedEarly,
    Gathered,
    Hooked,
    Probe,
    Late,
    OfTheStep,
]
CASES = [(make, strategy, options) for make in MODELS for strategy in STRATEGIES for options in OPTIONS]
QUICK = [(make, STRATEGIES[0], {}) for make in (OnBothSides, Hooked, Probe)]


@pytest.mark.parametrize(("make", "strategy", "options"), all_slow_but(CASES, *QUICK, (OfTheStep, STRATEGIES[1], {})))
def test_gradients_of_leaves_that_nobody_else_has_come_with_the_backward(
    make: Callable[[], Model], strategy: dict[str, Any], options: dict[str, Any]
) -> None:
    options = {"max_steps": STEPS + 3, **options}
    expected = train(make, batches(), devices=1, **options)
    found = train(make, batches(), devices=3, strategy=strategy, **options)
    assert_same_run(found, expected)
    seen, present = found.module.seen, [each is not None for each in expected.module.seen]
    assert any(present)
    assert [each is not None for each in seen] == present
    for one, other in zip(seen, expected.module.seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, check_device=False)
