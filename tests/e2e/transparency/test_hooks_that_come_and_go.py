"""Hooks on the gradients of parameters on the driver: in which order they run, and those that steps register."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from tests.e2e.support import assert_same_run, train
from tests.grids import all_slow_but

from ..modules import STEPS


class Model(LightningModule):
    """A layer on both sides of the blocks; ``seen`` is what hooks were given, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.seen: list[float] = []
        self.handle: Any = None

    def looks(self, gradient: Tensor) -> None:
        self.seen.append(float(gradient.norm()))

    def looks_after(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.looks(parameter.grad)

    def around(self) -> list[nn.Parameter]:
        return [*self.embed.parameters(), *self.head.parameters()]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InOrder(Model):
    def on_fit_start(self) -> None:
        for parameter in self.around():
            parameter.register_hook(self.looks)


class SumsInOrder(Model):
    def on_fit_start(self) -> None:
        for parameter in self.around():
            parameter.register_post_accumulate_grad_hook(self.looks_after)


class OneAfterAnother(Model):
    """What comes first decides about what comes last."""

    def on_fit_start(self) -> None:
        def keep(gradient: Tensor) -> None:
            self.last = gradient.norm()

        self.head.weight.register_hook(keep)
        self.embed.weight.register_hook(lambda gradient: gradient * self.last)


class OfSeveral(Model):
    def on_fit_start(self) -> None:
        register_multi_grad_hook(
            self.around(), lambda gradients: self.looks(torch.stack([g.norm() for g in gradients]))
        )


class FirstOfSeveral(Model):
    def on_fit_start(self) -> None:
        register_multi_grad_hook(self.around(), self.looks, mode="any")


class StepsAtOnce(Model):
    """An optimizer in the backward, as torch's tutorial has it."""

    def on_fit_start(self) -> None:
        for parameter in self.around():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(parameter: Tensor, optimizer: Any = optimizer) -> None:
                self.looks_after(parameter)
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.blocks.parameters(), lr=0.1)


class RemovesItself(Model):
    def on_fit_start(self) -> None:
        def once(gradient: Tensor) -> Tensor:
            self.looks(gradient)
            self.handle.remove()
            return gradient * 0

        self.handle = self.head.weight.register_hook(once)


class RemovesAnother(Model):
    def on_fit_start(self) -> None:
        self.handle = self.embed.weight.register_hook(self.looks)
        self.head.weight.register_hook(lambda gradient: self.handle.remove())


class Sparse(Model):
    """Rows of a table whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8, sparse=True)
        self.table.weight.register_hook(lambda gradient: gradient * 2)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return super().training_step((batch[0] + self.table(batch[1]), batch[1]), index)


class UntilTheBackward(Model):
    """Registered where a step finds none, and removed behind its backward."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.handle = self.handle or self.head.weight.register_hook(self.changes)
        return super().training_step(batch, index)

    def changes(self, gradient: Tensor) -> Tensor:
        self.looks(gradient)
        return gradient.clamp(-1e-3, 1e-3)

    def on_after_backward(self) -> None:
        self.handle.remove()
        self.handle = None


class ByEachStep(Model):
    """Registered by each step, so by each microbatch."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.handle = [parameter.register_hook(lambda gradient: gradient * 2) for parameter in self.around()]
        return super().training_step(batch, index)

    def on_after_backward(self) -> None:
        for handle in self.handle:
            handle.remove()


class SumsByEachStep(Model):
    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.handle = [each.register_post_accumulate_grad_hook(self.looks_after) for each in self.around()]
        return super().training_step(batch, index)

    def on_after_backward(self) -> None:
        for handle in self.handle:
            handle.remove()


class LeftByAStep(Model):
    """Registered by the third step, for good."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if index == 2 and self.handle is None:
            self.handle = self.embed.weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        return super().training_step(batch, index)


class RemovedByAStep(Model):
    def on_fit_start(self) -> None:
        self.handle = self.head.weight.register_hook(lambda gradient: gradient * 0)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if index == 2 and self.handle is not None:
            self.handle.remove()
            self.handle = None
        return super().training_step(batch, index)


def batches() -> Any:
    draw = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(16 * STEPS, 8, generator=draw), torch.arange(16 * STEPS) % 8)
    return torch.utils.data.DataLoader(data, batch_size=8)


MODELS: list[Callable[[], Model]] = [
    *(InOrder, SumsInOrder, OneAfterAnother, OfSeveral, FirstOfSeveral, StepsAtOnce, RemovesItself, RemovesAnother),
    *(Sparse, UntilTheBackward, ByEachStep, SumsByEachStep, LeftByAStep, RemovedByAStep),
]
STRATEGIES: list[dict[str, Any]] = [
    {"num_microbatches": 4},
    {"microbatches": "stack"},
    {"schedule": "gpipe", "driver_stage": True},
]
OPTIONS: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 2}]
CASES = [(make, strategy, options) for make in MODELS for strategy in STRATEGIES for options in OPTIONS]
QUICK = [(make, STRATEGIES[0], {}) for make in (OneAfterAnother, OfSeveral, UntilTheBackward, ByEachStep)]


@pytest.mark.parametrize(("make", "strategy", "options"), all_slow_but(CASES, *QUICK))
def test_hooks_run_as_in_one_backward(
    make: Callable[[], Model], strategy: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = train(make, batches(), devices=1, **options)
    found = train(make, batches(), devices=3, strategy=strategy, **options)
    assert_same_run(found, expected)
    torch.testing.assert_close(found.module.seen, expected.module.seen, rtol=1e-4, atol=1e-6)
