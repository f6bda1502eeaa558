"""What is computed in front of the blocks and goes past them, or into several calls: its gradient comes in two parts.

Sums of parts are exact, whatever makes them. What looks at a gradient, or bends it, would find each part by itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.support import assert_same_run, train
from tests.grids import slow

STRATEGIES: list[dict[str, Any]] = [{"num_microbatches": 1}, {"num_microbatches": 4, "microbatches": "stack"}]


class Normed(torch.autograd.Function):
    """Bends the gradient: that of a sum is not the sum of those of its parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (1e-3 + gradient.norm())


class Clamped(Normed):
    """Bends it, though it makes multiples of multiples."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(min=0)


class Reversed(Normed):
    """Does not: what a gradient reversal layer does."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


def hooked(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient / (1e-3 + gradient.norm()))
    return x


def kept(x: Tensor) -> Tensor:
    if x.requires_grad:
        x.retain_grad()
    return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Model(LightningModule):
    """Uses what ``way`` says, of which ``look`` has the gradient in its hands."""

    def __init__(self, way: str, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.way, self.look = way, look
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.seen: Tensor | None = None

    def stack(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        before = self.embed(batch[0])
        if self.way in ("around", "two calls", "only through"):
            before = self.seen = self.look(before)
        out = self.stack(before * 1)
        if self.way in ("behind", "chained"):
            out = self.look(out)
        if self.way == "around":
            out = out + before
        if self.way in ("two calls", "chained"):
            out = out + self.stack((before if self.way == "two calls" else out) * 0.5)
        return F.mse_loss(self.head(out), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005)


class Gradients(Callback):
    """Notes what the tensor has kept after each backward."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, Model)
        if module.seen is not None and module.seen.is_leaf is False and module.seen.retains_grad:
            assert module.seen.grad is not None
            self.values.append(module.seen.grad.detach().cpu())


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(
        TensorDataset(torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)), batch_size=8
    )


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["one", "stack"])
@pytest.mark.parametrize(
    ("way", "look"),
    [
        ("around", Reversed.apply),
        slow("two calls", Reversed.apply),
        ("chained", Reversed.apply),
        ("behind", hooked),
        slow("behind", Normed.apply),
        slow("only through", hooked),
        ("only through", Normed.apply),
    ],
)
def test_what_comes_whole_or_adds_up_is_exact(way: str, look: Any, strategy: dict[str, Any]) -> None:
    make = partial(Model, way, look)
    assert_same_run(train(make, data(), 3, strategy), train(make, data(), 1))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["one", "stack"])
@pytest.mark.parametrize("way", ["around", "two calls", slow("chained")])
@pytest.mark.parametrize(
    ("look", "what"),
    [(hooked, "registers a hook"), (Normed.apply, "backward of Normed"), (Clamped.apply, "backward of Clamped")],
)
def test_what_bends_parts_is_refused(way: str, look: Any, what: str, strategy: dict[str, Any]) -> None:
    with pytest.raises(SkipPipeError, match=what):
        train(partial(Model, way, look), data(), 3, strategy)


def test_hooks_of_modules_are_refused_too() -> None:
    def make() -> Model:
        model = Model("around", lambda x: x)
        model.embed.register_full_backward_hook(lambda *_: None)
        return model

    with pytest.raises(SkipPipeError, match="full backward hook"):
        train(make, data(), 3, STRATEGIES[0])


@pytest.mark.parametrize("way", ["around", "two calls"])
def test_tensors_that_keep_their_gradients_have_the_whole(way: str) -> None:
    ours, one = Gradients(), Gradients()
    train(partial(Model, way, kept), data(), 3, STRATEGIES[0], callbacks=[ours])
    train(partial(Model, way, kept), data(), 1, callbacks=[one])
    assert len(one.values) == len(ours.values) > 0
    for found, expected in zip(ours.values, one.values, strict=True):
        torch.testing.assert_close(found, expected)


class Rated(Block):
    """Returns something that it has computed of what it returns first."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = super().forward(hidden)
        return hidden, hidden.pow(2).mean(-1)


class WithRatings(Model):
    """The loss uses what the last block has returned, and something computed of that inside of the block."""

    def __init__(self, way: str, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__(way, look)
        if way == "second output":
            self.blocks = nn.ModuleList(Rated() for _ in range(4))
        else:
            self.blocks[-1].register_forward_hook(lambda module, args, output: self.kept.append(output))
        self.kept: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.kept.clear()
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
            if isinstance(hidden, tuple):
                hidden, rating = hidden
                self.kept.append(rating)
        out = self.look(hidden)
        return F.mse_loss(self.head(out), batch[1]) + sum(each.pow(2).mean() for each in self.kept)


@pytest.mark.parametrize("way", ["second output", "hook on the last block"])
@pytest.mark.parametrize("look", [hooked, kept])
def test_so_is_looking_at_what_the_last_block_has_computed_with(way: str, look: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(SkipPipeError, match="a part of its gradient comes from the blocks"):
        train(lambda: WithRatings(way, look), data(), 3, {"num_microbatches": 1})


@pytest.mark.parametrize("way", ["second output", "hook on the last block"])
def test_what_the_driver_makes_of_it_may_be_looked_at(way: str) -> None:
    def build() -> WithRatings:
        return WithRatings(way, lambda tensor: hooked(tensor.clone()))

    assert_same_run(train(build, data(), 3, {"num_microbatches": 1}), train(build, data(), 1))
