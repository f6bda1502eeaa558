"""Blocks that keep something from one forward to the next, in steps that call them several times: as in one process.

Each call counts once, in the order of the calls, and one that runs once more computes with what it found at first.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from skippipe_plugin import RecoveryPolicy
from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.testing import At, Injector, Kill, Phase
from tests.e2e import test_several_calls_loops
from tests.e2e.modules import loader
from tests.e2e.support import DEVICE, Run, assert_same_losses, assert_same_run, train
from tests.e2e.transparency.plain_loops import assert_same
from tests.grids import slow

DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


class Kept(nn.Module):
    """What it adds follows from what it has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("total", torch.zeros(()))
        self.total: Tensor

    def factor(self, hidden: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        factor = self.factor(hidden.detach()) if self.training else 0.0
        return hidden + torch.tanh(self.linear(hidden)) * (1 + 0.1 * factor)


class Normed(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


class Counted(Kept):
    def factor(self, hidden: Tensor) -> Any:
        self.total += 1
        return self.total.clone()


class Replaced(Kept):
    """Has another tensor for its buffer each time."""

    def factor(self, hidden: Tensor) -> Any:
        self.total = 0.9 * self.total + hidden.mean()
        return self.total


class Listed(Kept):
    """Keeps a list, and numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.num = 0

    def factor(self, hidden: Tensor) -> Any:
        self.seen.append(float(hidden.mean()))
        self.num += 1
        return self.num + sum(self.seen)


class Booked(Kept):
    """Keeps a mean in a parameter that no optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.zeros(8), requires_grad=False)

    def factor(self, hidden: Tensor) -> Any:
        self.book.data.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        return self.book.clone()


class Sometimes(Kept):
    """Counts large inputs only."""

    def factor(self, hidden: Tensor) -> Any:
        if hidden.abs().max() > 2:
            self.total += 1
        return self.total.clone()


class Net(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([block() for _ in range(4)])

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        made = self.head(functools.reduce(lambda h, block: block(h), self.blocks, self.embed(x)))
        return made if targets is None else {"loss": F.mse_loss(made, targets)}


def goal(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def twice(net: Any, x: Tensor) -> Iterator[Tensor]:
    yield F.mse_loss(net(x), goal(x)) + net(x.flip(1)).pow(2).mean()


def targets_before(net: Any, x: Tensor) -> Iterator[Tensor]:
    with torch.no_grad():
        targets = net(x.flip(1)) + goal(x)
    yield F.mse_loss(net(x), targets)


def targets_between(net: Any, x: Tensor) -> Iterator[Tensor]:
    made = net(x)
    with torch.no_grad():
        targets = net(x.flip(1)) + goal(x)
    yield F.mse_loss(made, targets)


def evaluated_between(net: Any, x: Tensor) -> Iterator[Tensor]:
    yield test_several_calls_loops.evaluated_between(net, x)


def dropped(net: Any, x: Tensor) -> Iterator[Tensor]:
    net(x.flip(1))
    yield F.mse_loss(net(x), goal(x))


def in_turn(net: Any, x: Tensor) -> Iterator[Tensor]:
    yield F.mse_loss(net(x), goal(x))
    yield net(x.flip(1)).pow(2).mean()


def backwards(net: Any, x: Tensor) -> Iterator[Tensor]:
    first, second, third = net(x), net(x.flip(1)), net(x + 1)
    yield from ((third * second.detach()).mean(), F.mse_loss(second, goal(x)), first.pow(2).mean())


Losses = Callable[[Any, Tensor], Iterator[Tensor]]


class Module(LightningModule):
    def __init__(self, block: type[nn.Module], losses: Losses, *, manual: bool) -> None:
        super().__init__()
        self.net, self.losses, self.automatic_optimization = Net(block), losses, not manual

    def training_step(self, batch: Tensor, index: int) -> Any:
        if self.automatic_optimization:
            [loss] = self.losses(self.net, batch)
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for loss in self.losses(self.net, batch):
            self.manual_backward(loss)
            total += loss.detach()
        optimizer.step()
        return {"loss": total}

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.net(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(
    block: type[Kept],
    losses: Losses,
    devices: int,
    strategy: dict[str, Any] | None = None,
    *,
    manual: bool = False,
    **options: Any,
) -> Run:
    def make() -> LightningModule:
        return Module(block, losses, manual=manual)

    return train(make, loader(DATA, 8), devices, strategy, **{"max_steps": -1, "max_epochs": 1, **options})


def assert_exact(block: type[Kept], losses: Losses, strategy: dict[str, Any] | None = None, **options: Any) -> None:
    strategy = strategy or {"num_microbatches": 2}
    assert_same_run(fit(block, losses, 3, strategy, **options), fit(block, losses, 1, **options))


BLOCKS = [Counted, Listed, *(pytest.param(block, marks=pytest.mark.slow) for block in (Normed, Replaced, Booked))]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("losses", [slow(twice), targets_before, dropped])
def test_automatic_steps(block: type[Kept], losses: Losses) -> None:
    assert_exact(block, losses)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("losses", [slow(targets_between), in_turn, backwards])
def test_manual_steps(block: type[Kept], losses: Losses) -> None:
    assert_exact(block, losses, manual=True)


@pytest.mark.parametrize("block", [slow(Normed), Listed])
def test_evaluation_in_between(block: type[Kept]) -> None:
    assert_exact(block, evaluated_between)
    assert_exact(block, twice, val_data=loader(DATA[:16], 8), val_check_interval=2, accumulate_grad_batches=2)


@pytest.mark.parametrize("block", [Counted, Listed])
@pytest.mark.parametrize("losses", [twice, targets_before, dropped])
def test_blocks_on_the_driver(block: type[Kept], losses: Losses) -> None:
    assert_exact(block, losses, {"num_microbatches": 1, "driver_stage": True})


def test_what_is_kept_in_some_batches_only() -> None:
    assert_exact(Sometimes, twice, {"num_microbatches": 1})


@pytest.mark.parametrize("block", [slow(Counted), Listed])
def test_a_run_that_could_replace_workers(block: type[Kept]) -> None:
    for losses in (twice, targets_before, dropped):
        found = fit(block, losses, 3, {"num_microbatches": 2}, callbacks=[StageRecovery(spares=0)])
        assert_same_run(found, fit(block, losses, 1))


def test_a_call_in_which_a_worker_is_lost_counts_once() -> None:
    """The first stage has counted it already."""
    expected = fit(Counted, in_turn, 1, manual=True)
    with Injector(Kill(At(Phase.TRAINING, nth=1), who=2)) as injector:
        found = fit(Counted, in_turn, 3, {"num_microbatches": 2}, manual=True, callbacks=[StageRecovery(spares=1)])
    assert [each.done for each in injector.report] == [True]
    for name in ("net.blocks.0.total", "net.blocks.1.total"):
        assert found.weights[name] == expected.weights[name] > 0


def looped(losses: Losses) -> Callable[..., list[float]]:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen: list[float] = []
        for x in DATA.to(DEVICE).split(8):
            optimizer.zero_grad()
            for loss in losses(model, x):
                loss.backward()
                seen.append(float(loss.detach()))
            optimizer.step()
        return seen

    return loop


def own_losses(net: Any, x: Tensor) -> Iterator[Tensor]:
    yield net(x, targets=goal(x))["loss"] + 0.5 * net(x.flip(1), targets=goal(x))["loss"]


def gently(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("losses", [slow(twice), slow(own_losses), targets_between, dropped])
def test_loops(block: type[Kept], losses: Losses) -> None:
    assert_same(looped(losses), functools.partial(Net, block), optimizer=gently, num_microbatches=1)


def later(net: Any, x: Tensor) -> Iterator[Tensor]:
    """A second call in some of the batches."""
    yield from twice(net, x) if float(x[0, 1]) > 0 else [F.mse_loss(net(x), goal(x))]


@pytest.mark.parametrize("block", BLOCKS)
def test_loops_that_call_them_once_more_in_later_batches(block: type[Kept]) -> None:
    assert [float(x[0, 1]) > 0 for x in DATA.split(8)].index(True) > 0
    for settings in ({}, {"driver_stage": True}):
        options: dict[str, Any] = {"num_microbatches": 1, **settings}
        assert_same(looped(later), functools.partial(Net, block), optimizer=gently, **options)


def test_loops_that_could_replace_workers() -> None:
    for losses in (twice, own_losses):
        options: dict[str, Any] = {"num_microbatches": 1, "recovery": RecoveryPolicy(spares=0)}
        assert_same(looped(losses), functools.partial(Net, Listed), optimizer=gently, **options)


def test_who_knew_what_a_call_has_found_is_lost() -> None:
    """The first call of each step runs once more after the second one."""
    with Injector(Kill(At(Phase.TRAINING, nth=6), who=2)), pytest.raises(SkipPipeError, match="that knew it was lost"):
        fit(Listed, twice, 3, {"num_microbatches": 2}, callbacks=[StageRecovery(spares=1)])


class Summed(Kept):
    """Adds up in training, and uses that in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.count: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.count += len(hidden)
            self.total += hidden.detach().sum()
        mean = 0.0 if self.training else self.total / self.count.clamp(min=1)
        return hidden + torch.tanh(self.linear(hidden)) + mean


def once(net: Any, x: Tensor) -> Iterator[Tensor]:
    yield F.mse_loss(net(x), goal(x))


def test_replicas_would_each_keep_a_part() -> None:
    assert_same_run(fit(Summed, once, 3, {"num_microbatches": 4}), fit(Summed, once, 1))
    for block in (Summed, Booked):
        for count in (1, 4):
            with pytest.raises(
                SkipPipeError, match=r"writes (count|total|book), and stage . has replicas.*Use replicas=1"
            ):
                fit(block, once, 5, {"num_microbatches": count, "replicas": 2})


class Shown(nn.Module):
    """What it has kept in training shows in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.begin()

    def begin(self) -> None: ...

    def note(self, hidden: Tensor) -> None:
        raise NotImplementedError

    def shown(self) -> Any:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.note(hidden.detach())
        return hidden + torch.tanh(self.linear(hidden)) + (0.0 if self.training else self.shown())


class MeanOfInputs(Shown):
    def begin(self) -> None:
        self.mean = torch.zeros(8)

    def note(self, hidden: Tensor) -> None:
        self.mean = 0.9 * self.mean.to(hidden) + 0.1 * hidden.mean(0)

    def shown(self) -> Any:
        return self.mean


class MeanInPlace(MeanOfInputs):
    def note(self, hidden: Tensor) -> None:
        self.mean = self.mean.to(hidden)
        self.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)


class MeanFromTheFirst(MeanOfInputs):
    def begin(self) -> None:
        self.mean: Any = None

    def note(self, hidden: Tensor) -> None:
        mean = hidden.mean(0)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean


class MeanInBuffer(MeanFromTheFirst):
    def begin(self) -> None:
        self.register_buffer("mean", None, persistent=False)


class FewLast(Shown):
    def begin(self) -> None:
        self.seen: deque[float] = deque(maxlen=2)

    def note(self, hidden: Tensor) -> None:
        self.seen.append(float(hidden.mean()))

    def shown(self) -> Any:
        return sum(self.seen)


class Meter:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0


class Metered(Shown):
    """Keeps a mean of means: that of a batch is not to be told from its microbatches' as long as it is the first."""

    def begin(self) -> None:
        self.meter = Meter()

    def note(self, hidden: Tensor) -> None:
        self.meter.total += float(hidden.mean())
        self.meter.count += 1

    def shown(self) -> Any:
        return self.meter.total / max(self.meter.count, 1)


class InNumpy(Shown):
    def begin(self) -> None:
        self.mean = numpy.zeros(8)

    def note(self, hidden: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0).cpu().numpy()

    def shown(self) -> Any:
        return torch.as_tensor(self.mean, dtype=torch.float32, device=self.linear.weight.device)


class Last(Shown):
    def begin(self) -> None:
        self.last: Any = None

    def note(self, hidden: Tensor) -> None:
        self.last = hidden

    def shown(self) -> Any:
        return 0.0 if self.last is None else self.last.mean()


class Diagnosed(Shown):
    """Keeps something that nothing reads."""

    def begin(self) -> None:
        self.norm: Any = None

    def note(self, hidden: Tensor) -> None:
        self.norm = hidden.norm()

    def shown(self) -> Any:
        return 0.0


class Validated(Module):
    """Sums up what evaluation makes."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__(block, once, manual=False)
        self.seen: list[float] = []

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.seen.append(float(self.net(batch).mean()))


def validated(block: type[nn.Module], devices: int, strategy: dict[str, Any] | None = None) -> tuple[Run, list[float]]:
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "num_sanity_val_steps": 0}
    data = loader(DATA, 12)  # the last batch is smaller
    run = train(lambda: Validated(block), data, devices, strategy, val_data=loader(DATA[:16], 8), **options)
    assert isinstance(run.module, Validated)
    return run, run.module.seen


MORE_SHOWN = [MeanInPlace, MeanFromTheFirst, MeanInBuffer, FewLast, InNumpy, Last]
SHOWN = [MeanOfInputs, Metered, *(pytest.param(block, marks=pytest.mark.slow) for block in MORE_SHOWN)]


@pytest.mark.parametrize("block", SHOWN)
def test_what_only_evaluation_shows(block: type[Shown]) -> None:
    (expected, shown), (found, seen) = validated(block, 1), validated(block, 3, {"num_microbatches": 4})
    assert_same_run(found, expected)
    assert_same_losses(seen, shown)
    with pytest.raises(SkipPipeError, match=r"writes (mean|meter|seen|last), and stage . has replicas.*Use replicas=1"):
        validated(block, 5, {"num_microbatches": 4, "replicas": 2})


def test_what_nothing_shows_is_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    (expected, shown), (found, seen) = validated(Diagnosed, 1), validated(Diagnosed, 5, {"replicas": 2})
    assert_same_run(found, expected)
    assert_same_losses(seen, shown)
    assert "training_step runs once" not in caplog.text


LATE = torch.cat([0.5 * DATA[:16], 4 * DATA[16:24], 0.5 * DATA[24:]])
"""Large values come later than the first batch."""


class CountsLarge(Shown):
    def begin(self) -> None:
        self.register_buffer("total", torch.zeros(()))

    def note(self, hidden: Tensor) -> None:
        if hidden.abs().max() > 3.5:
            self.total += 1

    def shown(self) -> Any:
        return 0.1 * self.total


class CountsLargeAside(CountsLarge):
    def begin(self) -> None:
        self.total: Any = 0


def late(block: type[nn.Module], devices: int, strategy: dict[str, Any] | None = None, **options: Any) -> Run:
    options = {"max_steps": -1, "max_epochs": 1, "val_data": loader(DATA[:16], 8), **options}
    return train(lambda: Validated(block), loader(LATE, 8), devices, strategy, **options)


def test_buffers_that_are_first_written_when_batches_are_cut() -> None:
    with pytest.raises(SkipPipeError, match=r"written total, once for each of 4 microbatches.*num_microbatches=1, or"):
        late(CountsLarge, 3, {"num_microbatches": 4})
    assert_same_run(late(CountsLarge, 3, {"num_microbatches": 1}), late(CountsLarge, 1))


def test_attributes_that_are_first_written_when_batches_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    late(CountsLargeAside, 3, {"num_microbatches": 4})
    [said] = [each.getMessage() for each in caplog.records if "begun to write" in each.getMessage()]
    assert "net.blocks.0.total" in said
    assert "With num_microbatches=1 they are" in said


class Switched(Shown):
    """Counts as soon as it is told to."""

    def begin(self) -> None:
        self.is_on = False
        self.register_buffer("total", torch.zeros(()))

    def note(self, hidden: Tensor) -> None:
        if self.is_on:
            self.total += 1

    def shown(self) -> Any:
        return 0.1 * self.total


class SwitchOn(Callback):
    """Tells the blocks when so many batches have been."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        for block in module.net.blocks:
            block.is_on = trainer.global_step >= self.after


def test_buffers_that_are_written_from_a_later_batch_on() -> None:
    """In each epoch the step is tried anew; what replicas would keep is asked once."""
    options: dict[str, Any] = {"callbacks": [SwitchOn(len(LATE) // 8)], "max_epochs": 2}
    expected, found = late(Switched, 1, **options), late(Switched, 3, {"num_microbatches": 4}, **options)
    assert_same_run(found, expected)
    assert_same_losses(found.module.seen, expected.module.seen)
    for settings, where in (({"replicas": 2}, "on one replica only.*with replicas=1"), ({}, "once for each of 4")):
        options["callbacks"] = [SwitchOn(len(LATE) // 8 if settings else 2)]
        with pytest.raises(SkipPipeError, match=f"written total, {where}"):
            late(Switched, 5 if settings else 3, {"num_microbatches": 4, **settings}, **options)
