"""What is trained on the driver beside the model as it was: layers that come later, and what only an optimizer has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from tests.e2e.support import DEVICE, assert_same_run, train
from tests.grids import all_slow_but

from ..modules import STEPS


class Model(LightningModule):
    """Four blocks and a head; ``further`` holds what is trained and is no part of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 4)
        self.further: list[Any] = []

    def stack(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.stack(hidden))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def parameters_to_train(self) -> list[Any]:
        return [*self.parameters(), *(each for part in self.further for each in _parameters_of(part))]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters_to_train(), lr=1e-2)

    def on_train_end(self) -> None:
        self.left = [each.detach().clone() for part in self.further for each in _parameters_of(part)]


def _parameters_of(part: Any) -> list[Tensor]:
    return list(part.parameters()) if isinstance(part, nn.Module) else [part]


class Unregistered(Model):
    """A layer in a list behind the blocks, and a number beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.further = [nn.Linear(8, 8), nn.Parameter(torch.zeros(()))]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.further[0](self.stack(hidden)))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        weight = self.further[1]
        return super().training_step(batch, index) * torch.exp(-weight) + weight


class UnregisteredInFront(Unregistered):
    """The same in front of them."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.stack(self.further[0](hidden)))


class Twice(Unregistered):
    """Calls the blocks twice."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + super().forward(hidden * 0.5)


class Manual(Unregistered):
    """Goes back by itself, with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        of_further = [each for part in self.further for each in _parameters_of(part)]
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(of_further, 0.1)]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss


class Grown(Model):
    """Gets a layer before the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.more: nn.Module | None = None

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == 2:
            self.grow()

    def grow(self) -> None:
        torch.manual_seed(3)
        self.more = nn.Linear(8, 8)
        self.trainer.optimizers[0].add_param_group({"params": list(self.more.parameters())})

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.stack(hidden)
        return self.head(hidden if self.more is None else self.more(hidden))


class GrownInAStep(Grown):
    """Gets it in its first forward."""

    def on_train_batch_start(self, batch: Any, index: int) -> None: ...

    def forward(self, hidden: Tensor) -> Tensor:
        if self.more is None:
            self.grow()
        return super().forward(hidden)


class AnotherBlock(Grown):
    """Gets a block more."""

    def grow(self) -> None:
        torch.manual_seed(3)
        self.blocks.append(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
        self.trainer.optimizers[0].add_param_group({"params": list(self.blocks[-1].parameters())})


class AnotherHead(Grown):
    """Gets another head in place of the first, whose group has another list of parameters then."""

    def grow(self) -> None:
        torch.manual_seed(3)
        self.head = nn.Linear(8, 4)
        self.trainer.optimizers[0].param_groups[0]["params"] = [*self.blocks.parameters(), *self.head.parameters()]


class WithoutALayer(Grown):
    """Loses a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(8, 8)

    def grow(self) -> None:
        self.more = None


MODELS: list[Callable[[], Model]] = [
    Unregistered,
    UnregisteredInFront,
    Twice,
    Manual,
    Grown,
    GrownInAStep,
    AnotherBlock,
    AnotherHead,
    WithoutALayer,
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.05},
]


def batches() -> Any:
    draw = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8 * STEPS, 8, generator=draw), torch.arange(8 * STEPS) % 4)
    return torch.utils.data.DataLoader(data, batch_size=8)


STRATEGIES: list[dict[str, Any]] = [
    {"num_microbatches": 4},
    {"microbatches": "stack"},
    {"schedule": "gpipe", "driver_stage": True},
]
CASES = [
    (make, strategy, options)
    for make in MODELS
    for strategy in STRATEGIES
    for options in OPTIONS
    if make is not Manual or not options  # Lightning does neither under manual optimization
]
QUICK = [(make, STRATEGIES[0], {}) for make in (Unregistered, Manual, Grown, GrownInAStep)]


@pytest.mark.parametrize(("make", "strategy", "options"), all_slow_but(CASES, *QUICK))
def test_what_has_come_beside_the_model_is_trained(
    make: Callable[[], Model], strategy: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = train(make, batches(), devices=1, **options)
    found = train(make, batches(), devices=3, strategy=strategy, **options)
    assert_same_run(found, expected)
    torch.testing.assert_close(found.module.left, expected.module.left, rtol=1e-5, atol=1e-6, check_device=False)


def looped(module: Model, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for hidden, target in batches():
        outputs = module(hidden.to(DEVICE))
        loss = nn.functional.cross_entropy(outputs, target.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [each.detach().clone() for part in module.further for each in _parameters_of(part)]


def made() -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(1)
    module = UnregisteredInFront().to(DEVICE)
    module.further = [module.further[0].to(DEVICE)]
    return module, torch.optim.AdamW(module.parameters_to_train(), lr=1e-2)


def test_a_loop_trains_what_only_its_optimizer_has() -> None:
    module, optimizer = made()
    expected, weights = looped(module, optimizer), module.state_dict()
    module, optimizer = made()
    with TorchPipeline(module, optimizer, SkipPipeConfig(num_stages=2, num_microbatches=4)):
        found = looped(module, optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_device=False)
    torch.testing.assert_close(module.state_dict(), weights, rtol=1e-4, atol=1e-5, check_device=False)
