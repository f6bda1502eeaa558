"""Calls of the blocks that only some batches make: the step goes on as one of several calls, as in one process."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.pipeline import TRAINING
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.model.spread import SpreadModel
from skippipe_plugin.strategies import checks
from skippipe_plugin.testing import At, Injector, Kill, Phase
from tests.e2e.modules import loader
from tests.e2e.support import Run, assert_same_run, train
from tests.e2e.test_kept_state import Counted, Kept, Listed, Normed, goal
from tests.e2e.test_kept_state import Net as KeptNet
from tests.e2e.test_several_calls import Module as Several
from tests.e2e.test_several_calls import Net
from tests.grids import slow

DATA = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
WHOLE: list[dict[str, Any]] = [
    {"num_microbatches": 1},
    {"num_microbatches": 2},
    {"num_microbatches": 2, "microbatches": "stack"},
    {"num_microbatches": 2, "driver_stage": True},
]
More = Callable[[Any, Tensor], Tensor]


def consistent(net: Any, x: Tensor) -> Tensor:
    return (net(x.flip(1)) - net(x + 1).detach()).pow(2).mean()


def watched(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x.flip(1)).mean()


def chained(net: Any, x: Tensor) -> Tensor:
    return net(x + net(x)).pow(2).mean()


class Regular(LightningModule):
    """Has a further term in every third batch, beginning with the third."""

    def __init__(self, more: More = consistent, block: type[Kept] | None = None) -> None:
        super().__init__()
        self.net: Any = Net() if block is None else KeptNet(block)
        self.more = more

    def is_due(self, batch: Tensor, index: int) -> bool:
        return index % 3 == 2

    def training_step(self, batch: Tensor, index: int) -> Any:
        loss = F.mse_loss(self.net(batch), goal(batch))
        self.log("first", loss)
        if self.is_due(batch, index):
            loss = loss + self.more(self.net, batch) * torch.rand((), device=self.device)
            self.log("both", loss)
        return {"loss": loss}

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.net(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Flagged(Regular):
    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.flag = index % 3 == 2

    def is_due(self, batch: Tensor, index: int) -> bool:
        return self.flag


class Valued(Regular):
    def is_due(self, batch: Tensor, index: int) -> bool:
        return bool(batch.abs().max() > 2.4)


class Drawn(Regular):
    """Draws whether it has one."""

    def is_due(self, batch: Tensor, index: int) -> bool:
        return bool(torch.rand(()) < 0.4)


def fit(make: Callable[[], LightningModule], devices: int, strategy: dict[str, Any] | None = None, **more: Any) -> Run:
    return train(make, loader(DATA, 8), devices, strategy, **{"max_steps": -1, "max_epochs": 1, **more})


def assert_exact(make: Callable[[], LightningModule], strategy: dict[str, Any], **options: Any) -> None:
    found, expected = fit(make, 3, strategy, **options), fit(make, 1, **options)
    assert_same_run(found, expected)
    metrics = [{k: float(v) for k, v in run.trainer.callback_metrics.items()} for run in (found, expected)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


@pytest.mark.parametrize(
    "strategy",
    [
        WHOLE[0],
        pytest.param(WHOLE[1], marks=pytest.mark.slow),
        *WHOLE[2:3],
        pytest.param(WHOLE[3], marks=pytest.mark.slow),
    ],
    ids=["one", "two", "stack", "driver"],
)
@pytest.mark.parametrize("more", [consistent, slow(watched), chained])
def test_in_every_third_batch(more: More, strategy: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert_exact(functools.partial(Regular, more), strategy)
    assert caplog.text.count("calls the blocks 2 times or more") == 1


@pytest.mark.parametrize("make", [slow(Flagged), Valued])
def test_by_a_flag_or_by_values(make: Callable[[], LightningModule]) -> None:
    for strategy in WHOLE[:2]:
        assert_exact(make, strategy)


@pytest.mark.parametrize("strategy", [WHOLE[0], WHOLE[2]], ids=["one", "stack"])
def test_by_chance(strategy: dict[str, Any]) -> None:
    assert_exact(Drawn, strategy)


def test_by_chance_in_a_batch_that_is_cut_already_is_refused() -> None:
    """Each microbatch would draw for itself."""
    with pytest.raises(SkipPipeError, match="more often than in the batches before"):
        fit(Drawn, 3, WHOLE[1])


@pytest.mark.parametrize("block", [Counted, *(pytest.param(each, marks=pytest.mark.slow) for each in (Normed, Listed))])
@pytest.mark.parametrize("more", [slow(consistent), watched])
def test_of_blocks_that_keep_something(more: More, block: type[Kept]) -> None:
    for strategy in (WHOLE[0], WHOLE[3]):
        assert_exact(functools.partial(Regular, more, block), strategy)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"val_data": loader(DATA[:16], 8), "val_check_interval": 2},
        {"precision": "bf16-mixed"},
    ],
    ids=["accumulated", "clipped", "validated", "mixed"],
)
def test_with_what_the_trainer_does(options: dict[str, Any]) -> None:
    tolerances = {"rtol": 1e-2, "weights_rtol": 1e-2, "weights_atol": 1e-3} if "precision" in options else {}
    found, expected = (fit(Regular, *each, **options) for each in ((3, WHOLE[0]), (1, None)))
    assert_same_run(found, expected, **tolerances)


@pytest.mark.parametrize("nth", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_worker_that_is_lost_on_the_way_is_replaced(nth: int) -> None:
    """The third step has the first call twice, and two others in between."""
    strategy = {"num_microbatches": 2, "microbatches": "stack", "replicas": 2}
    with Injector(Kill(At(Phase.TRAINING, nth=nth), who=2)) as injector:
        found = fit(Regular, 5, strategy, callbacks=[StageRecovery(spares=1)])
    assert [each.done for each in injector.report] == [True]
    assert_same_run(found, fit(Regular, 1))


class Masking(nn.Module):
    """What it makes is linear in its weights, for each draw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.5, self.training) * self.weight


class Masked(Regular):
    """The first call makes the whole loss; in one of the batches others follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net.blocks = nn.ModuleList([Masking() for _ in range(4)])
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, index: int) -> Any:
        hidden = functools.reduce(lambda h, block: block(h), self.net.blocks, self.net.embed(batch))
        self.made = hidden.sum()
        return self.made + (0 * self.net.blocks[-1](self.through(batch)).sum() if index == 2 else 0)

    def through(self, batch: Tensor) -> Tensor:
        return functools.reduce(lambda h, block: block(h), self.net.blocks[:-1], self.net.embed(batch))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for block in self.net.blocks:
            self.seen.append((float((block.weight * block.weight.grad).sum()), float(self.made)))


@pytest.mark.parametrize("strategy", [WHOLE[0], WHOLE[2], WHOLE[3]], ids=["one", "stack", "driver"])
def test_what_runs_once_more_draws_the_same(strategy: dict[str, Any]) -> None:
    run = fit(Masked, 3, strategy, limit_train_batches=4)
    assert isinstance(run.module, Masked)
    assert len(run.module.seen) == 16
    for product, made in run.module.seen:
        assert product == pytest.approx(made, rel=1e-4)


class Noting(Regular):
    """Notes which paths the calls of each batch take."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[set[Any]] = []

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.paths.append(set())


def test_all_calls_of_such_a_batch_take_the_same_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[Noting] = []

    def noting(spread: SpreadModel, *args: Any) -> None:
        choose(spread, *args)
        modules[0].paths[-1].add(spread.pipeline.whole_schedules[TRAINING].paths)

    choose = SpreadModel._choose_paths
    monkeypatch.setattr(SpreadModel, "_choose_paths", noting)
    strategy = {"num_microbatches": 3, "microbatches": "stack", "skip_ratio": 1 / 3}
    fit(lambda: modules.append(Noting()) or modules[0], 4, strategy)  # type: ignore[func-returns-value]
    assert [len(each) for each in modules[0].paths] == [1] * 6
    assert len(set.union(*modules[0].paths)) > 1


class Changing(Several):
    """Changes in place what the blocks have got, before it calls them once more."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        hidden = torch.tanh(self.net.embed(batch)).detach().requires_grad_()
        hidden = hidden * 1
        made = functools.reduce(lambda h, block: block(h), self.net.blocks, hidden)
        loss = self.net.head(made).pow(2).mean()
        if index == 2:
            with torch.no_grad():
                hidden += 1
            loss = loss + self.net(batch).pow(2).mean()
        return loss


def test_what_the_blocks_got_may_not_change_then() -> None:
    with pytest.raises(SkipPipeError, match="was changed in place after they were called"):
        fit(Changing, 3, WHOLE[0])


def test_a_driver_that_may_start_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "supervised", lambda: True)
    with pytest.raises(SkipPipeError, match="skippipe run"):
        fit(Regular, 3, WHOLE[0])
