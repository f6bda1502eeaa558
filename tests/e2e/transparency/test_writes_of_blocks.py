"""What a block's forward leaves behind where it runs: closed to the driver's code, and harmless to who never asks."""

import copy
import functools
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.driver.capture.unavailable import Unavailable
from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train
from tests.grids import all_slow_but, slow

DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls, self.table = 0, {}

    def forward(self, hidden: Tensor) -> Tensor:
        out = torch.tanh(self.linear(hidden))
        self.calls += 1
        self.table["mean"] = float(out.mean())
        return out


class Block(nn.Module):
    """Leaves something of each sort behind."""

    found_in_class = None

    def __init__(self) -> None:
        super().__init__()
        self.core, self.history, self.l_aux = Core(), [], None

    def reset(self) -> None:
        self.history = []

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.core(hidden)
        self.l_aux = out.pow(2).mean(0)
        self.history.append(len(out))
        self.found_in_class = out.detach()
        if torch.is_grad_enabled():
            self.with_gradients = True
        if not self.training:
            self.attention = out.detach()
        return hidden + out


class Model(LightningModule):
    def __init__(self, touch: Callable[[Any], object] = lambda _: None, where: str = "training_step") -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.touch, self.where = touch, where

    def forward(self, x: Tensor, where: str) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        if where == self.where:
            self.touch(self)
        return self.head(hidden)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return F.mse_loss(self(batch, "training_step"), batch.sum(1, keepdim=True))

    def validation_step(self, batch: Tensor, index: int) -> None:
        self(batch, "validation_step")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.where == "on_train_batch_end":
            self.touch(self)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(make: Callable[[], LightningModule], devices: int = 3, **strategy: Any) -> Any:
    pipe = {"num_microbatches": 4, "verbose": False, **strategy} if devices > 1 else None
    return train(make, loader(DATA), devices, pipe, max_steps=4, val_data=loader(DATA), num_sanity_val_steps=1)


TOUCHES = {
    "history, by a method": (lambda model: model.blocks[0].reset(), "blocks.0.history"),
    "history, read": (lambda model: len(model.blocks[2].history), "blocks.2.history"),
    "calls of a submodule": (lambda model: model.blocks[1].core.calls + 1, "blocks.1.core.calls"),
    "calls, set": (lambda model: setattr(model.blocks[1].core, "calls", 0), "blocks.1.core.calls"),
    "table": (lambda model: model.blocks[3].core.table["mean"], "blocks.3.core.table"),
    "of the class": (lambda model: model.blocks[3].found_in_class, "blocks.3.found_in_class"),
    "written with gradients only": (lambda model: hasattr(model.blocks[3], "with_gradients"), "with_gradients"),
    "deleted": (lambda model: delattr(model.blocks[3], "history"), "blocks.3.history"),
}


@pytest.mark.parametrize("driver_stage", [False, slow(True)])
@pytest.mark.parametrize("what", TOUCHES)
def test_who_touches_what_forward_writes_reads_why_not(what: str, driver_stage: bool) -> None:
    touch, name = TOUCHES[what]
    with pytest.raises(SkipPipeError, match=f"the attribute .*{name} is written by the block's forward"):
        fit(lambda: Model(touch), driver_stage=driver_stage)


@pytest.mark.parametrize("where", ["validation_step", "on_train_batch_end"])
@pytest.mark.parametrize("name", ["history", "attention"])
def test_so_it_is_in_validation_and_in_hooks(where: str, name: str) -> None:
    with pytest.raises(SkipPipeError, match=f"the attribute blocks.2.{name} is written by the block's forward"):
        fit(lambda: Model(lambda model: getattr(model.blocks[2], name), where))


class Late(Block):
    """Writes something for the first time in its sixth call."""

    def forward(self, hidden: Tensor) -> Tensor:
        if self.core.calls > 6:
            self.late = True
        return super().forward(hidden)


class LateModel(Model):
    def __init__(self) -> None:
        super().__init__(lambda model: getattr(model.blocks[1], "late", None), "on_train_batch_end")
        self.blocks = nn.ModuleList([Late() for _ in range(4)])


def test_what_is_written_late_is_known_after_that_step() -> None:
    with pytest.raises(SkipPipeError, match=r"the attribute blocks\.\d\.late is written by the block's forward"):
        fit(LateModel)


class SetBefore(Model):
    def on_train_batch_start(self, *_: Any) -> None:
        for block in self.blocks:
            block.core.calls = 10


def test_what_user_code_sets_and_forward_writes_is_refused_in_the_first_step() -> None:
    with pytest.raises(SkipPipeError, match=r"the attribute blocks\.\d\.core\.calls is written by the block's forward"):
        fit(SetBefore)


@pytest.mark.parametrize("driver_stage", [False, True])
def test_who_never_asks_gets_the_run_of_one_process(driver_stage: bool, caplog: pytest.LogCaptureFixture) -> None:
    plain, piped = fit(Model, 1), fit(Model, driver_stage=driver_stage)
    assert_same_run(piped, plain)
    block = piped.module.blocks[1]
    assert type(block) is Block
    assert type(block.core) is Core
    assert caplog.text.count("the blocks' forwards have written attributes, on workers (blocks.") == 1
    assert block.history == []  # from before the run
    block(torch.zeros(2, 8))  # everything is open again
    assert block.core.calls > 0


class Copying(Model):
    """Copies and pickles a block in the middle of the run."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.copies = [type(copy.deepcopy(self.blocks[0].core)), type(pickle.loads(pickle.dumps(self.blocks[1].core)))]


def test_a_copy_of_a_part_is_of_the_part_s_own_class() -> None:
    assert fit(Copying, driver_stage=True).module.copies == [Core, Core]


# ----------------------------------------------------------- second outputs


class TwoOutputs(Block):
    def forward(self, hidden: Tensor) -> Any:
        out = super().forward(hidden)
        return out, out.pow(2).mean()


class Twofold(LightningModule):
    def __init__(self, use: Callable[[Any], object]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([TwoOutputs() for _ in range(4)])
        self.use = use

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden, second = block(hidden)
            self.use(second)
        return F.mse_loss(self.head(hidden), batch.sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


USES: dict[str, Callable[[Any], object]] = {
    "added to a number": lambda second: 0.0 + second,
    "times a tensor": lambda second: torch.ones(1) * second,
    "compared": lambda second: second > 0,
    "equal": lambda second: second == 1,
    "method": lambda second: second.mean(),
    "shape": lambda second: second.shape,
    "stacked": lambda second: torch.stack([second]),
    "in a function": torch.relu,
    "negative": operator.neg,
    "in a set of sums": lambda second: sum([second, second]),
}


@pytest.mark.parametrize("use", all_slow_but(USES, "times a tensor", "method", "in a function", "in a set of sums"))
def test_any_use_of_a_second_output_is_exact(use: str) -> None:
    make = functools.partial(Twofold, USES[use])
    assert_same_run(fit(make), fit(make, 1))


VALUES: dict[str, Callable[[Any], object]] = {"true": bool, "a float": float, "a number": lambda second: second.item()}


@pytest.mark.parametrize("use", VALUES)
def test_a_use_of_the_value_of_a_second_output_says_where_it_is(use: str) -> None:
    with pytest.raises(SkipPipeError, match=r"needs a second output of blocks\.0 \("):
        fit(lambda: Twofold(VALUES[use]))


class Numbered(Block):
    def forward(self, hidden: Tensor) -> Any:
        out = super().forward(hidden)
        return out, {"depth": 3, "name": "block"}, out.detach().mean().item()


class OfNumbers(Twofold):
    def __init__(self, use: Callable[[Any, Any], Any]) -> None:
        super().__init__(lambda _: None)
        self.blocks = nn.ModuleList([Numbered() for _ in range(4)])
        self.use = use

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        hidden, factor = self.embed(batch), 1.0
        for block in self.blocks:
            hidden, settings, mean = block(hidden)
            factor = factor * self.use(settings, mean)
        return F.mse_loss(self.head(hidden) * factor, batch.sum(1, keepdim=True))


def test_numbers_that_a_block_returns_are_known_unless_they_follow_from_values() -> None:
    make = functools.partial(OfNumbers, lambda settings, mean: settings["depth"] / len(settings["name"]))
    assert_same_run(fit(make), fit(make, 1))
    with pytest.raises(SkipPipeError, match=r"needs the second output of blocks\.0 \(item 3 of what it returns\)"):
        fit(lambda: OfNumbers(lambda settings, mean: 1 + mean))


def test_what_fails_in_one_process_fails_alike() -> None:
    with pytest.raises(TypeError, match="iteration over a 0-d tensor"):
        fit(lambda: Twofold(lambda second: [*second]))


def test_a_second_output_that_nobody_uses_costs_nothing() -> None:
    kept: list[Any] = []
    plain, piped = fit(lambda: Twofold(lambda _: None), 1), fit(lambda: Twofold(kept.append))
    assert_same_run(piped, plain)
    assert type(kept[0]) is Unavailable
    assert repr(pickle.loads(pickle.dumps(copy.copy(kept[0])))) == repr(kept[0])


# --------------------------------------------------------------- ways out


class Router(nn.Module):
    """Computes an auxiliary loss in a module of its own, which a hook can watch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.balance = nn.Linear(8, 8), nn.Identity()
        self.state: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.state = None  # reset where it is used, not by the driver
        out = torch.tanh(self.linear(hidden))
        self.l_aux = self.balance(out.pow(2).mean())
        return hidden + out


class Watched(Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Router() for _ in range(4)])
        self.losses: list[Tensor] = []
        for block in self.blocks:
            block.balance.register_forward_hook(lambda module, args, out: self.losses.append(out))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.losses.clear()
        return super().training_step(batch, index) + 0.5 * sum(self.losses)


def test_a_hook_brings_an_auxiliary_loss_back_as_the_refusal_says() -> None:
    plain, piped = fit(Watched, 1), fit(Watched)
    assert_same_run(piped, plain)
