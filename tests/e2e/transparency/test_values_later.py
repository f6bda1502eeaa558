"""What a step does by values or lengths that its first batches do not have: one process's result all the same."""

import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.grids import all_slow_but, slow

from ..models import TanhBlock
from ..support import assert_same_run, train

Batch = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Model(LightningModule):
    def __init__(self, loss: Loss, columns: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, columns)
        self.blocks = nn.ModuleList(TanhBlock() for _ in range(2))
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        hidden = functools.reduce(lambda h, block: block(h), self.blocks, self.embed(x))
        return self.head(hidden)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.loss(self, *batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def features() -> list[Batch]:
    """Batches whose features are small, and then large; labels that all differ, and then do not."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(6):
        x, labels = torch.rand(8, 4, generator=generator) - 0.5, torch.arange(8)
        if number > 3:  # the first three are asked about in any case
            x, labels = x * 8 - torch.tensor([0.5, 0, 0, 0]), labels // 2
        batches.append((x, labels, 0.5 + torch.rand(8, generator=generator)))
    return batches


def classes(module: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(module(x), labels, reduction="none")


def selected(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return classes(module, x, labels)[x[:, 0] < 0.6].mean()


def weighted(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    kept = (x[:, 0].abs() > 1) + 1.0
    return (classes(module, x, labels) * kept).sum() / kept.sum()


def negatives(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    output, negative = module(x), x[:, 0] < -0.6
    loss = F.cross_entropy(output, labels)
    return loss + output[negative].pow(2).mean() if negative.any() else loss


def outlying(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    loss = classes(module, x, labels).mean()
    return loss * 2 if x.abs().max() > 2 else loss


def outlying_by_number(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    loss = classes(module, x, labels).mean()
    return loss * 2 if x.abs().max().item() > 2 else loss


def hardest(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    loss = classes(module, x, labels)
    return loss[loss > 1.95].mean()


def bounded(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    output = module(x)
    return F.cross_entropy(output, labels) * min(1.0, float(output.detach().abs().max()))


BY_VALUES: dict[str, Loss] = {
    "selected": selected,
    "weighted": weighted,
    "negatives": negatives,
    "outlying": outlying,
    "outlying, by a number": outlying_by_number,
    "hardest": hardest,
    "clipped": lambda module, x, y, w: classes(module, x * torch.clamp(4 / x.norm(), max=1.0), y).mean(),
    "clipped, by a number": lambda module, x, y, w: classes(module, x / max(1.0, float(x.abs().max())), y).mean(),
    "clipped, by a list": lambda module, x, y, w: classes(module, x / max(*x.flatten().tolist(), 1.0), y).mean(),
    "clipped, by an array": lambda module, x, y, w: classes(module, x / max(1.0, x.cpu().numpy().max()), y).mean(),
    "clipped, by a sum": lambda module, x, y, w: classes(module, x / x.abs().max().clamp(min=1), y).mean(),
    "hidden states by a number": bounded,
    "different labels": lambda module, x, y, w: classes(module, x, y).mean() * len(torch.unique(y)),
}


def ordinary(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What it compares and counts leaves its results those of its samples."""
    assert x.isfinite().all()
    assert (labels < 8).all()
    output = module(torch.where(x > 9, 9.0, x))
    assert not (output.abs() > 1e4).any()
    loss = F.cross_entropy(output, labels, reduction="none").clamp(max=50)
    loss = (loss * weights).sum() / weights.sum().clamp(min=1e-6)
    module.log("accuracy", (output.argmax(1) == labels).float().mean())
    module.log("highest", float(output.max()), reduce_fx="max")
    assert math.isfinite(float(loss) + x.sum().item() + output.detach().cpu().numpy().mean() + loss.tolist())
    module.log("bounded", torch.where(output > 40, output, output * 0.1).mean())
    return loss


def by_length(lengths: list[Any]) -> list[Batch]:
    """Batches of padded sequences; a number says that all samples have that length."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for each in lengths:
        own = torch.tensor([each] * 8 if isinstance(each, int) else each)
        size = (8, int(own.max()))
        x, y = torch.randn(*size, 4, generator=generator), torch.randn(*size, 1, generator=generator)
        batches.append((x, y, own))
    return batches


def errors(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(module(x), y, reduction="none")


def long_ones(module: Any, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    output = module(x)
    loss = F.mse_loss(output, y)
    return loss + output.std(0).mean() if x.size(1) > 12 else loss


def odd_ones(module: Any, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    output = module(x)
    loss = F.mse_loss(output, y)
    return loss * output.pow(2).mean().sqrt() if x.size(1) % 2 else loss


def padded(module: Any, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    mask = (torch.arange(x.size(1), device=x.device) < lengths[:, None]).float()[..., None]
    return (errors(module, x, y) * mask).sum() / mask.sum()


def both(loss: Loss, batches: list[Batch], caplog: Any) -> str:
    make = functools.partial(Model, loss, 8 if batches[0][1].ndim == 1 else 1)
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, _Batches(batches), 3, {"num_microbatches": 3, "verbose": False}, max_steps=len(batches))
    assert_same_run(found, train(make, _Batches(batches), 1, max_steps=len(batches)))
    return caplog.text  # type: ignore[no-any-return]


def observed(module: Any, x: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    known = ~torch.isnan(y)
    return F.mse_loss(module(x)[known], y[known])


class _Batches(torch.utils.data.IterableDataset[Batch]):
    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches


@pytest.mark.parametrize(
    "name",
    all_slow_but(
        BY_VALUES,
        "selected",
        "negatives",
        "outlying, by a number",
        "hardest",
        "clipped, by a list",
        "hidden states by a number",
        "different labels",
    ),
)
def test_what_depends_on_values_of_later_batches_is_that_of_one_process(name: str, caplog: Any) -> None:
    assert "runs once, on the whole batch" in both(BY_VALUES[name], features(), caplog)


IS_POSITIVE: dict[str, Callable[[Tensor], Any]] = {
    "any": lambda x: (x > 0).any(),
    "all": lambda x: not torch.all((x <= 0) & (x < 9)),
    "sum": lambda x: (x > 0).sum() > 0,
    "sum, as a number": lambda x: (x > 0).sum().item() > 0,
    "selected": lambda x: x[x > 0].numel(),
    "found": lambda x: len(torch.nonzero(x > 0)),
    "list": lambda x: max(x.flatten().tolist()) > 0,
    "array": lambda x: (x.cpu().numpy() > 0).any(),
    "equal": lambda x: not torch.equal(x.clamp(min=0), torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", all_slow_but(IS_POSITIVE, "any", "sum, as a number", "selected", "list", "equal"))
def test_what_samples_of_each_microbatch_decide_at_first_is_that_of_one_process(name: str, caplog: Any) -> None:
    """Features are divided where any is positive; from the fifth batch on a microbatch has none."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 4, generator=generator), torch.arange(8), torch.ones(8)) for _ in range(6)]
    for x, *_ in batches[4:]:
        x[:3] = -x[:3].abs()

    def loss(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return classes(module, x / 4 if IS_POSITIVE[name](x) else x, labels).mean()

    assert "runs once, on the whole batch" in both(loss, batches, caplog)


class ByHidden(Model):
    """Shifts what is behind its blocks unless some of it is large; without biases, none is where all features are 0."""

    def __init__(self, is_large: Callable[[Tensor], Any]) -> None:
        super().__init__(classes, 8)
        self.embed, self.blocks = nn.Linear(4, 8, bias=False), nn.ModuleList(Scaled() for _ in range(2))
        self.is_large = is_large

    def training_step(self, batch: Batch, _: int) -> Tensor:
        x, labels, _weights = batch
        hidden = functools.reduce(lambda h, block: block(h), self.blocks, self.embed(x))
        shifted = hidden if self.is_large(hidden.detach() - 0.2) else hidden + 0.5
        return F.cross_entropy(self.head(shifted), labels)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.weight


@pytest.mark.parametrize("name", ["any", "sum", "selected", "list", "array"])
def test_what_hidden_states_of_each_microbatch_decide_at_first_is_that_of_one_process(name: str) -> None:
    batches = [(x * 8, labels, weights) for x, labels, weights in features()]
    batches[4][0][:3] = 0
    make = functools.partial(ByHidden, IS_POSITIVE[name])
    found = train(make, _Batches(batches), 3, {"num_microbatches": 3, "verbose": False}, max_steps=len(batches))
    assert_same_run(found, train(make, _Batches(batches), 1, max_steps=len(batches)))


def test_comparisons_of_samples_leave_the_batch_cut(caplog: Any) -> None:
    assert "runs once" not in both(ordinary, features(), caplog)


def heavy(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """A mean over samples of some weight; it looks at single values, so it is asked what it does with larger ones."""
    module.log("largest", float(weights.max()), reduce_fx="max")
    is_heavy = weights > 75
    return (classes(module, x, labels) * is_heavy).sum() / is_heavy.sum()


def test_what_counts_by_its_value_leaves_the_batch_cut_whatever_its_values(caplog: Any) -> None:
    assert "runs once" not in both(heavy, [(x, y, 100 * weights) for x, y, weights in features()], caplog)


@pytest.mark.parametrize("loss", [long_ones, odd_ones])
def test_what_depends_on_lengths_of_later_batches_is_that_of_one_process(loss: Loss, caplog: Any) -> None:
    assert "runs once, on the whole batch" in both(loss, by_length([8, 12, 8, 20, 9, 8]), caplog)


def test_padding_that_comes_later_leaves_the_batch_cut(caplog: Any) -> None:
    later = [12, 12, 12, 12, [12, 3, 4, 5, 12, 9, 2, 1], [7, 8, 9, 10, 11, 2, 3, 12]]
    assert "runs once" not in both(padded, by_length(later), caplog)


def test_targets_that_are_missing_later_leave_the_batch_cut(caplog: Any) -> None:
    batches = by_length([4] * 6)
    for number in (3, 4):
        batches[number][1][number : 2 * number, :2] = float("nan")
    assert "runs once" not in both(observed, batches, caplog)


class Measured(Model):
    """Gives a metric of torchmetrics its logits, taken for shares where all of them lie between 0 and 1."""

    def __init__(self, metric: Callable[[], Any], shares: bool) -> None:
        super().__init__(lambda module, x, y, _: classes(module, x, y).mean(), 8)
        self.metric, self.shares = metric(), shares

    def validation_step(self, batch: Batch, _: int) -> None:
        output, (_, labels, _) = self(batch[0]), batch
        self.metric.update(output.sigmoid() if self.shares else output, F.one_hot(labels, 8))

    def on_validation_epoch_end(self) -> None:
        self.log("metric", self.metric.compute())
        self.metric.reset()


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("checked", [slow(False), True])
def test_what_metrics_make_of_logits_is_that_of_one_process(shares: bool, checked: bool, caplog: Any) -> None:
    f1 = functools.partial(torchmetrics.F1Score, "multilabel", num_labels=8, validate_args=checked)
    runs = []
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        for devices in (3, 1):
            pipe = {"num_microbatches": 8, "verbose": False} if devices > 1 else None
            make = functools.partial(Measured, f1, shares)
            runs.append(train(make, _Batches(features()), devices, pipe, val_data=_Batches(features()), max_steps=6))
    assert_same_run(*runs)
    assert runs[0].trainer.callback_metrics["metric"] == pytest.approx(
        float(runs[1].trainer.callback_metrics["metric"])
    )
    assert ("runs once" in caplog.text) is not shares


# ------------------------------------------------------------- blocks that are put into another mode


class OwnNorm(nn.Module):
    """Looks at its batch while it trains."""

    def forward(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.training else h


class Normed(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), norm()

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.norm(self.linear(h)))  # type: ignore[no-any-return]


class Thawed(Model):
    """Lets its norms train from the third batch on."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__(lambda module, x, y, _: classes(module, x, y).mean(), 8)
        self.blocks = nn.ModuleList(Normed(norm) for _ in range(2))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for block in self.blocks:
            block.norm.train(batch_idx > 1)


@pytest.mark.parametrize(
    ("norm", "microbatches"),
    [
        pytest.param(OwnNorm, "auto", marks=pytest.mark.slow),
        (OwnNorm, "stack"),
        (functools.partial(nn.BatchNorm1d, 8), "stack"),
    ],
)
def test_norms_that_train_later_get_the_whole_batch(norm: Callable[[], nn.Module], microbatches: str) -> None:
    make, batches = functools.partial(Thawed, norm), features()
    pipe = {"num_microbatches": 3, "verbose": False, "microbatches": microbatches}
    found = train(make, _Batches(batches), 3, pipe, max_steps=len(batches))
    assert_same_run(found, train(make, _Batches(batches), 1, max_steps=len(batches)))
