"""Losses that are multiplied between the step and its backward, where that backward is not linear."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from skippipe_plugin import SkipPipeConfig, SkipPipeError
from skippipe_plugin.accelerate import SkipPipeAccelerator
from tests.e2e.models import TanhBlock as Block
from tests.e2e.modules import loader
from tests.e2e.support import DEVICE, assert_same_run, assert_same_weights, train
from tests.grids import all_slow_but, slow

from .plain_loops import assert_same, run

BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-2e-3, 2e-3)


class ClampedBlock(Block):
    def forward(self, h: Tensor) -> Tensor:
        return Clamped.apply(super().forward(h))  # type: ignore[no-any-return]


def hooked(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda grad: grad.clamp(-2e-3, 2e-3))
    return h


def keeping(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.retain_grad()
    return h


def looked_at(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda grad: print(grad.norm()))
    return h


def multiplying(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda grad: -0.5 * grad)
    return h


def as_it_is(h: Tensor) -> Tensor:
    return h


class Net(nn.Module):
    """Cuts gradients off before the blocks, in them or behind them, and returns its loss, or what it is made of."""

    def __init__(self, where: str = "", factor: float = 1.0) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        make = ClampedBlock if where == "in them" else Block
        self.blocks = nn.ModuleList(make() for _ in range(4))
        self.before = {"before": hooked, "kept": keeping, "multiplied": multiplying}.get(where, as_it_is)
        self.behind = {"behind": hooked, "function": Clamped.apply, "looked at": looked_at}.get(where, as_it_is)
        self.factor = factor
        if where == "module's hook":
            self.head.register_full_backward_hook(lambda module, grads, _: print(grads[0].norm()))

    def forward(self, x: Tensor, *, loss: bool = True) -> Any:
        h = self.before(self.embed(x))
        out = self.head(self.behind(functools.reduce(lambda h, block: block(h), self.blocks, h)))
        return {"loss": self.factor * F.mse_loss(out, x.sum(1, keepdim=True))} if loss else out


WHERE = ["before", "in them", "behind", "function", "kept", "looked at", "module's hook"]
DIVISOR = 4


def divided(model: Any, optimizer: torch.optim.Optimizer, factor: float = 1 / DIVISOR, *, outside: bool = False) -> Any:
    seen = []
    for x in (batch.to(DEVICE) for batch in BATCHES * 2):
        loss = F.mse_loss(model(x, loss=False), x.sum(1, keepdim=True)) if outside else model(x)["loss"]
        (loss * factor).backward()
        seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("where", WHERE)
def test_a_loop_that_divides_its_loss_is_refused_where_a_backward_bends(where: str) -> None:
    with pytest.raises(SkipPipeError, match=r"multiplied \(by 0\.25\) between the step and its backward"):
        run(divided, True, functools.partial(Net, where), microbatches="batch")


@pytest.mark.parametrize("where", all_slow_but(WHERE, "before", "behind", "kept", "module's hook"))
def test_it_is_exact_where_the_call_runs_once(where: str) -> None:
    """It goes back with the loop's backward."""
    assert_same(divided, functools.partial(Net, where), microbatches="stack")


@pytest.mark.parametrize("where", ["before", "behind"])
def test_the_ways_out_are_exact(where: str) -> None:
    (found, weights), (_, expected) = (
        run(functools.partial(divided, factor=1.0), True, functools.partial(Net, where, 1 / DIVISOR)),
        run(divided, False, functools.partial(Net, where)),
    )
    assert len(set(found)) > 1
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    assert_same(functools.partial(divided, outside=True), functools.partial(Net, where))


@pytest.mark.parametrize("cut", ["batch", "stack"])
def test_an_ordinary_backward_is_scaled(cut: str) -> None:
    assert_same(divided, Net, microbatches=cut)


def test_a_hook_that_multiplies_is_scaled() -> None:
    assert_same(divided, functools.partial(Net, "multiplied"))


def accelerated(accelerator: Accelerator, where: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Net(where)
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    try:
        for number, x in enumerate(BATCHES * 2):
            accelerator.backward(model(x)["loss"] / 2)
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    finally:
        accelerator.end_training()


def test_a_loop_of_accelerate() -> None:
    config = SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False)
    found = accelerated(SkipPipeAccelerator(cpu=True, config=config), "")
    assert_same_weights(found, accelerated(Accelerator(cpu=True), ""), atol=1e-6)
    with pytest.raises(SkipPipeError, match=r"multiplied \(by 0\.5\)"):
        accelerated(SkipPipeAccelerator(cpu=True, config=config), "behind")


class Module(LightningModule):
    def __init__(self, where: str, factor: float = 1.0) -> None:
        super().__init__()
        self.net, self.seen = Net(where, factor), []

    def training_step(self, batch: Tensor) -> Tensor:
        return self.net(batch)["loss"]  # type: ignore[no-any-return]

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


class Doubling(Module):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 2).backward()


DATA = loader(torch.cat(BATCHES), 8)


@pytest.mark.parametrize("cut", [slow("batch"), "stack"])
def test_backward_of_a_module_that_multiplies(cut: str) -> None:
    def fit(make: Callable[[], Any], devices: int) -> Any:
        strategy = {"num_microbatches": 4, "microbatches": cut} if devices > 1 else None
        return train(make, DATA, devices, strategy, max_steps=3)

    assert_same_run(fit(lambda: Doubling(""), 3), fit(lambda: Doubling(""), 1))
    for where in WHERE:
        with pytest.raises(SkipPipeError, match=r"multiplied \(by 2\) between the step"):
            fit(lambda where=where: Doubling(where), 3)
    inside = fit(lambda: Module("behind", 2.0), 3)
    torch.testing.assert_close(inside.weights, fit(lambda: Doubling("behind"), 1).weights, rtol=1e-4, atol=1e-5)
