"""What a step keeps elsewhere than in its own attributes, and what it takes from iterators, is that of one run."""

import collections
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, Dataset

from tests.grids import all_slow_but

from ..support import assert_same_run, train

Step = Callable[["Module", Tensor], Any]
NAMESPACE = types.SimpleNamespace(losses=[])


class Samples(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(22, 4, generator=torch.Generator().manual_seed(1))
        self.losses: list[float] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.x[index].sum(0, keepdim=True)


class History(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []


class Config:
    losses: ClassVar[list[float]] = []
    calls = 0


@dataclass(slots=True)
class Slotted:
    losses: list[float] = field(default_factory=list)
    calls: int = 0


Pair = collections.namedtuple("Pair", "losses other")


class Called:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def __call__(self, loss: Tensor) -> None:
        self.losses.append(loss.item())


class Mine(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.losses: list[float] = []

    def update(self, loss: Tensor) -> None:
        self.total += loss
        self.losses.append(loss.item())

    def compute(self) -> Tensor:
        return self.total


def counted() -> None:
    """Its attribute is changed."""


def recorder() -> tuple[Callable[[float], None], Callable[[], list[float]]]:
    losses: list[float] = []
    return losses.append, lambda: list(losses)


def weights() -> Iterator[float]:
    weight = 1.0
    while True:
        yield weight
        weight *= 0.8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Module(LightningModule):
    """Keeps things in many places; ``before`` and ``behind`` are what its step does with them."""

    def __init__(self, before: Step | None = None, behind: Step | None = None) -> None:
        super().__init__()
        self.steps = (before, behind)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.called, self.slotted, self.pair, self.mine = Called(), Slotted(), Pair([], {}), Mine()
        self.record, self.recorded = recorder()
        self.nested: dict[str, Any] = {"a": {"losses": [], "calls": 0}, "b": [torch.ones(1)]}
        self.hidden = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)]
        self.metrics = {"loss": torchmetrics.MeanMetric()}
        self.weights, self.cycle = weights(), [itertools.cycle([1.0, 0.5, 0.1])]

    def on_train_start(self) -> None:
        for unseen in (self.hidden[0], self.metrics["loss"]):  # of the Trainer
            unseen.to(self.device)
        Config.calls, Config.losses, NAMESPACE.losses = 0, [], []
        vars(counted).update(losses=[])
        draws = torch.Generator().manual_seed(3)
        self.others = iter(DataLoader(Samples(), batch_size=4, shuffle=True, generator=draws))
        self.shuffled = iter(DataLoader(Samples(), batch_size=2, shuffle=True))
        self.few: Iterator[float] = iter([0.5])

    def training_step(self, batch: Any, _: int) -> Tensor:
        before, behind = self.steps
        factor = before(self, batch[0]) if before else None
        h = self.embed(batch[0])
        for block in self.blocks:
            h = block(h)
        loss = F.mse_loss(self.head(h), batch[1])
        more = behind(self, loss.detach()) if behind else None
        return loss * (1.0 if factor is None else factor) * (1.0 if more is None else more)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        self.schedule = ExponentialLR(optimizer, 0.9)
        return optimizer


def decay(module: Module, _: Tensor) -> None:
    for group in module.trainer.optimizers[0].param_groups:
        group["lr"] *= 0.9


def average(module: Module, _: Tensor) -> None:
    for parameter, other in zip(module.hidden[0][0].parameters(), module.blocks[0].parameters(), strict=True):
        parameter.mul_(0.9).add_(0.1 * other.mean())


def add(module: Module, loss: Tensor) -> None:
    module.trainer.mine = [*getattr(module.trainer, "mine", []), loss.item()]  # type: ignore[attr-defined]


def refilled(module: Module, *_: Any) -> float:
    try:
        return next(module.few)
    except StopIteration:
        module.few = iter([0.25, 0.125])
        return next(module.few)


def history(module: Module) -> list[float]:
    return next(each.losses for each in module.trainer.callbacks if isinstance(each, History))  # type: ignore


def dataset(module: Module) -> Samples:
    found: Samples = module.trainer.train_dataloader.dataset
    return found


BEHIND: dict[str, tuple[Step, Callable[[Module], Any]]] = {
    "callback": (lambda m, loss: history(m).append(loss.item()), history),
    "trainer": (add, lambda m: m.trainer.mine),  # type: ignore[attr-defined]
    "dataset": (lambda m, loss: dataset(m).losses.append(loss.item()), lambda m: dataset(m).losses),
    "rate": (decay, lambda m: m.trainer.optimizers[0].param_groups[0]["lr"]),
    "scheduler": (lambda m, _: m.schedule.step(), lambda m: m.schedule.last_epoch),
    "called": (lambda m, loss: m.called(loss), lambda m: m.called.losses),
    "slots": (lambda m, loss: setattr(m.slotted, "calls", m.slotted.calls + 1), lambda m: m.slotted.calls),
    "tuple": (lambda m, loss: m.pair.losses.append(loss.item()), lambda m: m.pair.losses),
    "closure": (lambda m, loss: m.record(loss.item()), lambda m: m.recorded()),
    "class": (lambda m, loss: Config.losses.append(loss.item()), lambda m: list(Config.losses)),
    "namespace": (lambda m, loss: NAMESPACE.losses.append(loss.item()), lambda m: list(NAMESPACE.losses)),
    "function": (lambda m, loss: vars(counted)["losses"].append(1), lambda m: list(vars(counted)["losses"])),
    "metric": (lambda m, loss: m.metrics["loss"].update(loss), lambda m: m.metrics["loss"].compute().item()),
    "own metric": (lambda m, loss: m.mine.update(loss), lambda m: m.mine.losses),
    "averages": (average, lambda m: m.hidden[0][0].weight.flatten().tolist()),
}
BEFORE: dict[str, tuple[Step, Callable[[Module], Any]]] = {
    "teacher": (lambda m, x: 1.0 + float(m.hidden[0](x).abs().mean()), lambda m: m.hidden[0][1].running_mean.tolist()),
    "nested": (lambda m, _: m.nested["a"]["losses"].append(1), lambda m: m.nested["a"]["losses"]),
    "tensor": (lambda m, _: m.nested["b"][0].mul_(0.9).item(), lambda m: m.nested["b"][0].item()),
    "slotted list": (lambda m, _: m.slotted.losses.append(1), lambda m: m.slotted.losses),
    "generator": (lambda m, _: next(m.weights), lambda m: next(m.weights)),
    "cycle": (lambda m, _: next(m.cycle[0]), lambda m: next(m.cycle[0])),
    "loader": (lambda m, _: float(next(m.others)[0].pow(2).mean()), lambda m: next(m.others)[0].flatten().tolist()),
    "shuffled": (lambda m, _: float(next(m.shuffled)[0].pow(2).mean()), lambda m: torch.rand(2).tolist()),
    "refilled": (refilled, refilled),
}
PIPELINES = ({"num_microbatches": 4}, {"num_microbatches": 3, "driver_stage": True}, {"microbatches": "stack"})


def _run(devices: int, steps: tuple[Step | None, Step | None], read: Callable[[Module], Any], settings: Any) -> Any:
    loader = DataLoader(Samples(), batch_size=8)
    strategy = {"verbose": False, "num_microbatches": 4, **settings} if devices > 1 else None
    run = train(lambda: Module(*steps), loader, devices, strategy, max_steps=5, callbacks=[History()])
    assert isinstance(run.module, Module)
    return run, read(run.module)


def _compare(steps: tuple[Step | None, Step | None], read: Callable[[Module], Any], settings: Any) -> None:
    expected, found = _run(1, steps, read, None), _run(3, steps, read, settings)
    assert_same_run(found[0], expected[0])
    assert found[1] == pytest.approx(expected[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "place",
    all_slow_but(BEHIND, "callback", "dataset", "scheduler", "slots", "closure", "namespace", "function", "own metric"),
)
def test_what_is_kept_anywhere_is_that_of_one_run(place: str) -> None:
    step, read = BEHIND[place]
    _compare((None, step), read, PIPELINES[0])


@pytest.mark.parametrize("place", all_slow_but(BEFORE, "teacher", "nested", "generator", "loader", "shuffled"))
def test_what_changes_before_the_blocks_changes_once(place: str) -> None:
    step, read = BEFORE[place]
    _compare((step, None), read, PIPELINES[0])


@pytest.mark.parametrize("settings", PIPELINES[1:])
@pytest.mark.parametrize("place", ["nested", "loader"])
def test_so_it_is_in_other_pipelines(place: str, settings: Any) -> None:
    step, read = BEFORE[place]
    _compare((step, None), read, settings)
