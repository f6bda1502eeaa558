"""Steps of an optimizer's own, and hooks around them: the workers step as one process does, or are asked not to."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e import own_steps as own
from tests.e2e.models import TanhBlock as Block
from tests.e2e.modules import loader
from tests.e2e.support import Run, assert_same_run, train

DATA = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
Make = Callable[[LightningModule], Optimizer]


class Model(LightningModule):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.make = make
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functools.reduce(lambda h, block: block(h), self.blocks, self.embed(x)))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return F.mse_loss(self(batch), batch.pow(2).sum(1, keepdim=True))

    def configure_optimizers(self) -> Optimizer:
        return self.make(self)


def fit(make: Make, devices: int, model: type[Model] = Model, microbatches: int = 4, **options: Any) -> Run:
    strategy = {"num_microbatches": microbatches, "verbose": False} if devices > 1 else None
    return train(lambda: model(make), loader(DATA), devices, strategy, **{"max_steps": 4, **options})


def assert_exact(make: Make, model: type[Model] = Model, **options: Any) -> None:
    expected, found = fit(make, 1, model, **options), fit(make, 3, model, **options)
    assert_same_run(found, expected)
    assert found.module.seen == pytest.approx(expected.module.seen, rel=1e-4)


STEPS: dict[str, Make] = {
    "calls its base": lambda m: own.Trivial(m.parameters(), lr=0.02, momentum=0.9),
    "calls its base, which calls its base": lambda m: own.TrivialTwice(m.parameters(), lr=0.02),
    "decays all after its base": lambda m: own.Decoupled(m.parameters(), lr=0.02),
    "clamps after its base": lambda m: own.Clamping(m.parameters(), lr=0.02, eps=1e-3),
    "decays before it looks for gradients": lambda m: own.Decaying(m.parameters()),
    "changes gradients": lambda m: own.Centralising(m.parameters(), lr=0.02, momentum=0.9),
    "changes gradients of the step before": lambda m: own.ClampingTooEarly(m.parameters(), lr=0.02, eps=1e-3),
    "has groups of either side": lambda m: own.Decoupled(
        [{"params": [*m.embed.parameters(), *m.head.parameters()]}, {"params": m.blocks.parameters(), "lr": 0.01}],
        lr=0.02,
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_does_to_weights_happens_once_to_each(name: str) -> None:
    for base in (SGD, Adam, torch.optim.AdamW, own.Trivial):
        own.hooked(base)  # torch calls the hooks once more for each class that it has wrapped
    assert_exact(STEPS[name])


class ClosureFirst(Model):
    """Has the gradients before the step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step()


@pytest.mark.parametrize("name", ["clamps after its base", "changes gradients of the step before"])
def test_steps_without_closures(name: str) -> None:
    own.hooked(Adam)
    assert_exact(STEPS[name], ClosureFirst)


def test_early_gradients_of_a_part_of_the_batches_are_refused() -> None:
    name = "changes gradients of the step before"
    assert_exact(STEPS["changes gradients"], accumulate_grad_batches=2)
    with pytest.raises(SkipPipeError, match=r"before it calls its closure.*do not accumulate"):
        fit(STEPS[name], 3, accumulate_grad_batches=2)


def with_hooks(module: LightningModule) -> Optimizer:
    """Hooks that read and write weights and read gradients, before and after."""
    optimizer = SGD(module.parameters(), lr=0.02)
    add_hooks(module, optimizer)
    return optimizer


def add_hooks(module: LightningModule, optimizer: Optimizer) -> None:
    def before(optimizer: Optimizer, *_: Any) -> None:
        module.seen += [float(p.detach().norm()) for p in module.parameters()]
        module.seen += [float(p.grad.norm()) for p in module.parameters() if p.grad is not None]

    def after(optimizer: Optimizer, *_: Any) -> None:
        module.seen += [float(p.detach().norm()) for g in optimizer.param_groups for p in g["params"]]
        for parameter in module.parameters():
            parameter.data.clamp_(-0.3, 0.3)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


class HookedLater(Model):
    def on_train_start(self) -> None:
        add_hooks(self, self.trainer.optimizers[0])


@pytest.mark.parametrize("model", [Model, HookedLater, ClosureFirst])
def test_hooks_around_a_step_run_when_all_parts_stand_there(model: type[Model]) -> None:
    assert_exact(STEPS["decays before it looks for gradients"] if model is HookedLater else with_hooks, model)


def hooked_twice(module: LightningModule) -> Optimizer:
    own.hooked(SGD)
    optimizer = own.Decoupled(module.parameters(), lr=0.02)
    add_hooks(module, optimizer)
    return optimizer


def test_hooks_in_the_middle_of_a_step_are_refused() -> None:
    with pytest.raises(SkipPipeError, match=r"in the middle of a step.*add_hooks.*on_before_optimizer_step"):
        fit(hooked_twice, 3)


class Failing(Model):
    """Its second batch fails in the closure of the step."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index == 1:
            raise ZeroDivisionError
        return super().training_step(batch, index)


def test_a_step_that_fails_leaves_the_groups_whole() -> None:
    modules: list[Failing] = []

    def make(module: Any) -> Optimizer:
        modules.append(module)
        return own.Decaying(module.parameters())

    with pytest.raises(ZeroDivisionError):
        fit(make, 3, Failing)
    optimizer = modules[-1].trainer.optimizers[0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(modules[-1].parameters()))
    assert "step" not in optimizer.__dict__


REFUSED: dict[str, tuple[Make, str]] = {
    "sums into an attribute": (
        lambda m: own.Summing(m.parameters()),
        "keeps in self.total .* on_before_optimizer_step",
    ),
    "sums into a late one": (lambda m: own.SummingLate(m.parameters()), "keeps in self.norms"),
    "sums into its group": (lambda m: own.SummingInGroups(m.parameters()), "keeps in 'seen' of group 0"),
    "looks for infinities": (lambda m: own.Guarded(m.parameters(), lr=0.02), "where any gradient is not finite"),
    "looks at the loss": (lambda m: own.ByLoss(m.parameters()), "depends on the loss that its closure returns"),
    "holds parameters": (lambda m: own.HoldingParameters(m.parameters()), "self.param_groups, and do the rest after"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_other_parts_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(SkipPipeError, match=f"(?s){message}"):
        fit(make, 3)
