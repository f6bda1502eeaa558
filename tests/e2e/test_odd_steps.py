"""Steps that do what hardly anybody does: as in one process, or an error that says why, and nothing is lost."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import PathConfig
from tests.grids import slow
from tests.zoo.following import Following

from .emulation import Watch
from .models import TanhBlock
from .modules import loader
from .support import Run, assert_same_run, assert_same_weights, train

DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) / 2
Make = Callable[[], LightningModule]


class Block(nn.Module):
    """Adds a condition, whose gradient needs none of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden) + condition)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(TanhBlock() for _ in range(4))

    def encoded(self, hidden: Tensor, *given: Tensor) -> Tensor:
        return functools.reduce(lambda h, block: block(h, *given), self.blocks, hidden)

    def error(self, hidden: Tensor, batch: Tensor) -> Tensor:
        return F.mse_loss(self.head(hidden), batch.pow(2).sum(1, keepdim=True))

    def loss(self, batch: Tensor) -> Tensor:
        return self.error(self.encoded(self.embed(batch)), batch)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Conditioned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.condition = nn.ModuleList(Block() for _ in range(4)), nn.Linear(4, 8)


def fit(make: Make, workers: int, strategy: dict[str, Any] | None = None, **options: Any) -> Run:
    usual = {"num_microbatches": 4, "verbose": False}
    settings = {**usual, **(strategy or {})} if workers else None
    return train(make, loader(DATA, 8), 1 + workers, settings, **{"max_steps": -1, "max_epochs": 1, **options})


def assert_exact(make: Make, **strategy: Any) -> None:
    assert_same_run(fit(make, 2, strategy), fit(make, 0))


def assert_refused(
    make: Make, says: str, steps: int = 0, error: type[Exception] = SkipPipeError, **strategy: Any
) -> None:
    """Compare what is left after an error with one process that has made as many steps."""
    made: list[LightningModule] = []

    def kept() -> LightningModule:
        made.append(make())
        return made[-1]

    with pytest.raises(error, match=says):
        fit(kept, 2, strategy)
    seed_everything(0, verbose=False)
    expected = fit(make, 0, max_steps=steps).weights if steps else make().state_dict()
    assert_same_weights(made[-1].state_dict(), expected)


# Numbers of calls -----------------------------------------------------------------------------------------------------


class ByValue(Net):
    """Calls the blocks again where a sample is large: other microbatches than others."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.encoded(self.embed(batch))
        return self.error(self.encoded(hidden) if batch.abs().max() > 1 else hidden, batch)


class BySize(Net):
    """Calls them again for more than two samples."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.encoded(self.embed(batch))
        return self.error(self.encoded(hidden) if len(batch) > 2 else hidden, batch)


class UntilStill(Net):
    """Calls them until little changes, at most four times."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        for _ in range(4):
            before, hidden = hidden, self.encoded(hidden)
            if float((hidden - before).norm()) < 2:
                break
        return self.error(hidden, batch)


class NotAlways(Net):
    """Does without them where the first sample is positive."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        return self.error(self.encoded(hidden) if batch[0, 0] < 0 else hidden, batch)


CALLING = next(index for index in range(5) if DATA[8 * index, 0] > 0)
"""So many batches call them, before one does without."""


class MoreAndMore(Net):
    """Calls them more often every second batch."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        hidden = self.embed(batch)
        for _ in range(1 + index // 2):
            hidden = self.encoded(hidden)
        return self.error(hidden, batch)


@pytest.mark.parametrize("make", [ByValue, slow(BySize), slow(UntilStill), MoreAndMore], ids=lambda make: make.__name__)
def test_numbers_of_calls_that_differ(make: Make) -> None:
    assert_exact(make)


def test_a_batch_without_any_call_is_refused() -> None:
    assert_refused(NotAlways, "without calling the blocks", CALLING)


@pytest.mark.parametrize("make", [ByValue, BySize], ids=lambda make: make.__name__)
def test_who_wants_such_a_batch_cut_reads_why_not(make: Make) -> None:
    assert_refused(make, "microbatches=.stack.", microbatches="batch")


# What the loss does not depend on -------------------------------------------------------------------------------------


class Unused(Net):
    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        self.encoded(hidden)
        return self.error(hidden, batch)


class Detached(Net):
    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        return self.error(hidden, batch) + self.encoded(hidden).detach().mean()


class UsedInTurn(Net):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        hidden = self.embed(batch)
        made = self.encoded(hidden)
        return self.error(made if index % 2 else hidden, batch)


class OneUnused(Net):
    """Uses what the second of three calls returns."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        made = [self.encoded(hidden * factor) for factor in (1, 2, 3)]
        return self.error(made[1], batch)


class AllUnused(Net):
    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        for factor in (1, 2):
            self.encoded(hidden * factor)
        return self.error(hidden, batch)


class WithoutGradient(Net):
    def loss(self, batch: Tensor) -> Tensor:
        return self.encoded(self.embed(batch)).detach().mean()


@pytest.mark.parametrize(
    "make", [slow(Unused), Detached, UsedInTurn, slow(OneUnused), AllUnused], ids=lambda make: make.__name__
)
def test_a_loss_that_depends_on_nothing_that_a_call_returned(make: Make) -> None:
    assert_exact(make)


def test_a_loss_without_any_gradient_is_the_error_of_one_process() -> None:
    assert_refused(WithoutGradient, "does not require grad", error=RuntimeError)


# In place -------------------------------------------------------------------------------------------------------------


class ConditionChanged(Conditioned):
    """Changes what all blocks got when they have run, and uses it."""

    def loss(self, batch: Tensor) -> Tensor:
        condition = self.condition(batch) * 1
        made = self.encoded(self.embed(batch), condition)
        condition.mul_(2.0).add_(made.detach())
        return self.error(made, batch) + condition.pow(2).mean()


class MadeTrainable(Conditioned):
    """Lets what the blocks got without a gradient get one afterwards."""

    def loss(self, batch: Tensor) -> Tensor:
        condition = torch.zeros(len(batch), 8, device=batch.device)
        made = self.encoded(self.embed(batch), condition)
        condition.add_(self.condition(batch))
        return self.error(made, batch) + condition.pow(2).mean()


class HiddenChanged(Net):
    """Changes what entered, which autograd has saved in one process: an error there."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch) * 1
        made = self.encoded(hidden)
        return self.error(made, batch) + hidden.mul_(3.0).pow(2).mean()


class HiddenCopied(Net):
    """The same without it."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch) * 1
        return self.error(self.encoded(hidden), batch) + (hidden * 3.0).pow(2).mean()


class ChangedBetweenCalls(Conditioned):
    """Changes what the first of two calls got."""

    grad = False

    def loss(self, batch: Tensor) -> Tensor:
        condition = self.condition(batch) * 1 if self.grad else self.condition(batch).detach()
        first = self.encoded(self.embed(batch), condition)
        condition.mul_(2.0)
        return self.error(first + self.encoded(self.embed(batch), condition), batch)


class ChangedBetweenCallsWithGradient(ChangedBetweenCalls):
    grad = True


class ChangedBetweenBlocks(Conditioned):
    def loss(self, batch: Tensor) -> Tensor:
        hidden, condition = self.embed(batch), self.condition(batch) * 1
        for block in self.blocks:
            hidden = block(hidden, condition)
            condition.mul_(0.5)
        return self.error(hidden, batch)


WHERE: list[dict[str, Any]] = [{}, {"microbatches": "stack"}]


@pytest.mark.parametrize("strategy", WHERE, ids=["batch", "stack"])
@pytest.mark.parametrize("make", [ConditionChanged, MadeTrainable], ids=lambda make: make.__name__)
def test_what_was_handed_over_may_change_when_the_blocks_have_run(make: Make, strategy: dict[str, Any]) -> None:
    assert_exact(make, **strategy)


@pytest.mark.parametrize("strategy", WHERE, ids=["batch", "stack"])
def test_hidden_states_that_change_afterwards_are_those_of_a_copy(strategy: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit(HiddenChanged, 0)
    assert_same_run(fit(HiddenChanged, 2, strategy), fit(HiddenCopied, 0))


@pytest.mark.parametrize(
    "make", [ChangedBetweenCalls, ChangedBetweenCallsWithGradient, ChangedBetweenBlocks], ids=lambda make: make.__name__
)
def test_what_blocks_would_get_changed_is_refused(make: Make) -> None:
    assert_refused(make, "changed in place")


# Hooks that replace an output, on stages that are skipped -------------------------------------------------------------


class Hooked(Net):
    """Replaces what a block and a part of another one return."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_hook(lambda module, args, output: 1.5 * output)
        self.blocks[2].linear.register_forward_hook(lambda module, args, output: output - 0.5)


class HookedLater(Net):
    """The same on the driver, since it keeps what it has seen."""

    def on_train_start(self) -> None:
        self.kept: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.kept.append(output.detach())
            return 1.5 * output

        self.blocks[1].register_forward_hook(hook)


SKIPPING: dict[str, Any] = {"skip_ratio": 0.25, "paths": PathConfig(costs="uniform")}


def test_a_hook_that_replaces_an_output_runs_where_its_block_runs() -> None:
    watch = Watch()
    found = fit(Hooked, 4, SKIPPING, callbacks=[watch])
    assert any(2 not in path.stages for path in watch.schedules[0].paths)
    assert_same_run(found, fit(Hooked, 0, callbacks=[Following(watch.schedules)]))


def test_a_hook_on_the_driver_that_replaces_an_output_is_refused_with_paths_too() -> None:
    with pytest.raises(SkipPipeError, match="returns a value"):
        fit(HookedLater, 4, SKIPPING)


# Optimizers that share a parameter ------------------------------------------------------------------------------------


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.loss(batch)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
        return loss.detach()

    def shared(self) -> nn.Module:
        return self.head

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.shared().parameters(), lr=1e-3, eps=1e-4)
        return [torch.optim.SGD(self.parameters(), lr=0.01), adam]


class SharingABlock(Manual):
    def shared(self) -> nn.Module:
        return self.blocks[0]


class SharingAll(Manual):
    def shared(self) -> nn.Module:
        return self


def test_two_optimizers_may_share_what_is_around_the_blocks() -> None:
    assert_exact(Manual)


@pytest.mark.parametrize("make", [SharingABlock, SharingAll], ids=lambda make: make.__name__)
def test_two_optimizers_that_share_a_block_are_refused(make: Make) -> None:
    assert_refused(make, "2 of the 2 optimizers step parameters of the blocks")
