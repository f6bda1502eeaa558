"""Gradients and weights that hooks read or write between backward and step, in runs that clip by the norm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader, points
from tests.e2e.support import Run, assert_same_run, train
from tests.grids import slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Looking(LightningModule):
    def __init__(self, hook: str, look: Callable[[Any], None]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.hook, self.look = hook, look
        self.seen: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        h = self.embed(batch["x"])
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(h), batch["y"])

    def on_after_backward(self) -> None:
        if self.hook == "on_after_backward":
            self.look(self)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.hook == "on_before_optimizer_step":
            self.look(self)

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


class HeadOnly(Looking):
    """Its optimizer has only a part of what needs gradients."""

    frozen = False
    owned: tuple[str, ...] = ("head",)

    def on_fit_start(self) -> None:
        if self.frozen:
            self.embed.requires_grad_(False)
            self.blocks.requires_grad_(False)

    def configure_optimizers(self) -> SGD:
        return SGD([p for name in self.owned for p in getattr(self, name).parameters()], lr=0.1)


def read_blocks(module: Looking) -> None:
    module.seen += [float(p.grad.norm()) for p in module.blocks.parameters() if p.grad is not None]


def one_block(module: Looking) -> None:
    gradient = module.blocks[2].linear.weight.grad
    module.seen.append(0.0 if gradient is None else float(gradient.sum()))


@pytest.mark.parametrize("look", [slow(read_blocks), one_block])
def test_gradients_that_no_optimizer_has(look: Callable[[Any], None]) -> None:
    """In one process they add up from step to step, since no optimizer zeroes them; workers drop them all."""
    data, pipeline = loader(points(32)), {"num_microbatches": 4, "verbose": False}
    with pytest.raises(SkipPipeError, match=r"is not that of one process.*Freeze them .*or give them to the optimizer"):
        train(lambda: HeadOnly("on_before_optimizer_step", look), data, 3, pipeline)

    class Frozen(HeadOnly):
        frozen = True

    class Whole(HeadOnly):
        owned = ("embed", "blocks", "head")

    for advised in (Frozen, Whole):
        make = partial(advised, "on_before_optimizer_step", look)
        found, expected = train(make, data, 3, pipeline), train(make, data, 1)
        assert_same_run(found, expected)
        assert found.module.seen == pytest.approx(expected.module.seen, rel=1e-4)


def test_what_no_optimizer_has_trains_nothing_and_changes_nothing() -> None:
    data = loader(points(32))
    found = train(lambda: HeadOnly("never", read), data, 3, {"num_microbatches": 4, "verbose": False})
    assert_same_run(found, train(lambda: HeadOnly("never", read), data, 1))


def read(module: Looking) -> None:
    module.seen.append(float(grad_norm(module, 2)["grad_2.0_norm_total"]))


def write(module: Looking) -> None:
    for parameter in module.parameters():
        assert parameter.grad is not None
        torch.nan_to_num(parameter.grad, out=parameter.grad)


def scale(module: Looking) -> None:
    for parameter in module.blocks[1].parameters():
        assert parameter.grad is not None
        parameter.grad.mul_(3.0)


def weights(module: Looking) -> None:
    module.seen.append(float(module.blocks[2].linear.weight.detach().norm()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_is_clipped_by_as_in_one_process(value: float) -> None:
    def spoil(module: Any) -> None:
        module.blocks[1].linear.weight.grad[0, 0] = value

    runs = [
        train(lambda: Looking("on_after_backward", spoil), loader(points(8)), n, max_steps=1, gradient_clip_val=0.1)
        for n in (3, 1)
    ]
    for name, expected in runs[1].weights.items():
        torch.testing.assert_close(runs[0].weights[name], expected, equal_nan=True)
    assert runs[1].weights["head.weight"].isnan().all() == (value != float("inf"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("settings", [{}, {"driver_stage": True}], ids=str)
@pytest.mark.parametrize("hook", [slow("on_after_backward"), "on_before_optimizer_step"])
@pytest.mark.parametrize("look", [slow(read), write, scale, slow(weights)])
def test_clipping_by_the_norm(look: Callable[[Any], None], hook: str, settings: dict[str, Any]) -> None:
    def fit(devices: int) -> Run:
        strategy = {"num_microbatches": 4, "verbose": False, **settings} if devices > 1 else None
        data = loader(points(24))
        return train(partial(Looking, hook, look), data, devices, strategy, max_steps=4, gradient_clip_val=0.1)

    piped, plain = fit(3), fit(1)
    assert_same_run(piped, plain)
    assert piped.module.seen == pytest.approx(plain.module.seen, rel=1e-5)


class Looked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8, sparse=True)

    def forward(self, h: Tensor, numbers: Tensor) -> Tensor:
        return super().forward(h) + self.table(numbers)


class LookingUp(Looking):
    def __init__(self, look: Callable[[Any], None]) -> None:
        super().__init__("on_before_optimizer_step", look)
        self.blocks = nn.ModuleList(Looked() for _ in range(4))

    def training_step(self, batch: Any, _: int) -> Tensor:
        h = self.embed(batch["x"])
        for block in self.blocks:
            h = block(h, batch["y"])
        return F.cross_entropy(self.head(h), batch["y"])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.05)


def test_sparse_gradients_are_read_and_written() -> None:
    def look(module: Any) -> None:
        for block in module.blocks:
            gradient = block.table.weight.grad
            assert gradient.is_sparse
            module.seen.append(float(gradient.to_dense().norm()))
            block.table.weight.grad = gradient * 0.5

    plain, found = (
        train(partial(LookingUp, look), loader(points(24)), devices, strategy, max_steps=3)
        for devices, strategy in ((1, None), (3, {"num_microbatches": 4}))
    )
    assert_same_run(found, plain)
    assert found.module.seen == pytest.approx(plain.module.seen, rel=1e-5)
