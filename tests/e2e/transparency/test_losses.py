"""Whatever a step computes, logs and returns is that of one process, however it reduces over samples, or is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from skippipe_plugin.engine.errors import SkipPipeError
from tests.grids import all_slow_but, slow

from ..support import Run, assert_same_run, train

PIPELINE = {"num_microbatches": 4, "verbose": False}
Step = Callable[[Any, Any], Any]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


class Model(LightningModule):
    """Tokens in, logits for each of them out; what it does with them is ``step``."""

    def __init__(self, step: Step, validate: Step | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.step, self.validate = step, validate
        self.seen: list[Any] = []

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.step(self, batch)

    def validation_step(self, batch: Any, index: int) -> Any:
        return self.validate(self, batch)

    def on_validation_batch_end(self, outputs: Any, *_: Any) -> None:
        self.seen.append(outputs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def ids(num: int = 28) -> Tensor:
    return torch.randint(1, 16, (num, 12), generator=torch.Generator().manual_seed(1))


def masked(fill: int, num: int = 28) -> Tensor:
    """The tokens, of which each sample keeps another number."""
    return torch.where(torch.arange(12) < torch.arange(num)[:, None] * 5 % 9 + 2, ids(num), fill)


def batches(*columns: Tensor, size: int = 8) -> DataLoader[Any]:
    """Batches of 8, the last one of 4."""
    return DataLoader(TensorDataset(*columns), batch_size=size)


def both(make: Callable[[], LightningModule], data: Any, **options: Any) -> tuple[Run, Run]:
    strategy = options.pop("strategy", {})
    plain = train(make, data, 1, **options)
    return train(make, data, 3, {**PIPELINE, **strategy}, **options), plain


def entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def per_token(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1].clamp(min=0), reduction="none")


def mean_over_mask(model: Any, batch: Any) -> Tensor:
    mask = batch[1] != -100
    return (per_token(model, batch) * mask).sum() / mask.sum()


def mean_per_sample(model: Any, batch: Any) -> Tensor:
    mask = (batch[1] != -100).float()
    return ((per_token(model, batch) * mask).sum(1) / mask.sum(1)).mean()


def shifted(model: Any, batch: Any) -> Tensor:
    return entropy(model(batch[0])[:, :-1], batch[1][:, 1:])


STEPS: dict[str, tuple[Step, Tensor]] = {
    "ignored": (lambda m, b: entropy(m(b[0]), b[1]), masked(-100)),
    "ignored_with_smoothing": (lambda m, b: entropy(m(b[0]), b[1], label_smoothing=0.1), masked(-100)),
    "own_ignore_index": (lambda m, b: entropy(m(b[0]), b[1], ignore_index=0), masked(0)),
    "ignored_at_the_end": (lambda m, b: entropy(m(b[0]), b[1], ignore_index=255), masked(255)),
    "shifted": (shifted, masked(-100)),
    "mean_over_mask": (mean_over_mask, masked(-100)),
    "mean_per_sample": (mean_per_sample, masked(-100)),
    "sum": (lambda m, b: entropy(m(b[0]), b[1], reduction="sum") / 100, masked(-100)),
    "sum_by_samples": (lambda m, b: entropy(m(b[0]), b[1], reduction="sum") / len(b[0]) / 10, masked(-100)),
    "mean_and_penalty": (lambda m, b: entropy(m(b[0]), b[1]) + m.head.weight.pow(2).sum() / 10, masked(-100)),
    "in_a_dict": (lambda m, b: {"loss": entropy(m(b[0]), b[1]), "logits": m.head.weight.sum()}, masked(-100)),
    "of_shape_one": (lambda m, b: entropy(m(b[0]), b[1])[None], masked(-100)),
    "positions": (
        lambda m, b: F.cross_entropy(m(b[0])[..., 0], b[1][:, 0].clamp(0, 12), ignore_index=12),
        torch.arange(28)[:, None] * 7 % 20,
    ),
}


@pytest.mark.parametrize(
    "name",
    all_slow_but(STEPS, "own_ignore_index", "shifted", "mean_over_mask", "sum", "mean_and_penalty"),
)
def test_losses_are_those_of_one_process(name: str) -> None:
    step, labels = STEPS[name]
    assert_same_run(*both(lambda: Model(step), batches(ids(), labels)))


@pytest.mark.parametrize(
    "settings", [{"driver_stage": True}, slow({"schedule": "gpipe"}), slow({"num_microbatches": 3})]
)
def test_labels_count_with_other_settings(settings: dict[str, Any]) -> None:
    step, labels = STEPS["ignored"]
    assert_same_run(*both(lambda: Model(step), batches(ids(), labels), strategy=settings))


def test_labels_are_ignored_in_a_later_batch_for_the_first_time() -> None:
    labels = masked(-100)
    labels[:16] = ids()[:16]
    assert_same_run(*both(lambda: Model(STEPS["ignored"][0]), batches(ids(), labels)))


def test_labels_are_unequal_in_a_later_batch_for_the_first_time() -> None:
    labels = masked(-100)
    labels[:8] = torch.where(torch.arange(12) < 6, ids()[:8], -100)
    assert_same_run(*both(lambda: Model(STEPS["ignored"][0]), batches(ids(), labels)))


def test_a_microbatch_without_labels() -> None:
    labels = masked(-100)
    labels[2:4] = -100
    assert_same_run(*both(lambda: Model(STEPS["ignored"][0]), batches(ids(), labels)))


def test_float_masks_and_weights() -> None:
    def step(model: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[0], reduction="none").mean(1)
        return (losses * batch[1]).sum() / batch[1].sum()

    assert_same_run(*both(lambda: Model(step), batches(ids(), torch.arange(28).remainder(5) + 0.5)))


def test_accumulated_batches() -> None:
    step, labels = STEPS["ignored"]
    data = batches(ids(), labels)
    assert_same_run(*both(lambda: Model(step), data, accumulate_grad_batches=2))


# ------------------------------------------------------------- not cut


def two_means(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return entropy(logits, batch[1]) + entropy(logits, batch[2])


def contrastive(model: Any, batch: Any) -> Tensor:
    features = F.normalize(model(batch[0]).mean(1), dim=1)
    return F.cross_entropy(features @ features.T * 10, torch.arange(len(features), device=features.device))


def perplexity(model: Any, batch: Any) -> Tensor:
    loss = entropy(model(batch[0]), batch[1])
    model.log("perplexity", loss.exp(), on_step=True, on_epoch=True)
    return loss


def longest(model: Any, batch: Any) -> Tensor:
    lengths = (batch[1] != -100).sum(1)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    return (per_token(model, batch)[:, :10] * mask).sum() / mask.sum()  # the longest of each batch has ten


def normalized(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return entropy((logits - logits.mean((0, 1))) / (logits.std((0, 1)) + 1e-3), batch[1])


def largest(model: Any, batch: Any) -> Tensor:
    return per_token(model, batch).amax()


def long_labels() -> list[Tensor]:
    labels = masked(-100)
    labels[::4] = torch.where(torch.arange(12) < 10, ids()[::4], -100)
    return [labels, labels.flip(0)]


WHOLE: dict[str, Step] = {
    "two_means": two_means,
    "contrastive": contrastive,
    "perplexity": perplexity,
    "longest": longest,
    "normalized": normalized,
}


@pytest.mark.parametrize("name", all_slow_but(WHOLE, "contrastive", "longest", "normalized"))
def test_what_does_not_reduce_runs_on_whole_batches(name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, step = batches(ids(), *long_labels()), WHOLE[name]
    found, plain = both(lambda: Model(step, step), data, val_data=data, num_sanity_val_steps=0)
    assert_same_run(found, plain)
    assert metrics(found) == pytest.approx(metrics(plain), rel=1e-5)
    told = [record for record in caplog.records if "runs once, on the whole batch" in record.getMessage()]
    assert len(told) == 2  # training and validation


def test_a_loss_that_is_one_microbatchs_is_no_mean() -> None:
    """The largest of the microbatches' losses is the batch's, but all of the gradient belongs to that microbatch."""
    data = batches(ids(), *long_labels())
    assert_same_run(*both(lambda: Model(largest, largest), data, val_data=data, num_sanity_val_steps=0))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        slow("two_means", "the loss of the batch does not follow.*microbatches='stack'.*microbatch_weight"),
        ("perplexity", "self.log..perplexity.. of the batch does not follow.*microbatches='stack'"),
        ("longest", "a microbatch fails where the batch does not.*microbatches='stack'"),
    ],
)
def test_what_does_not_reduce_is_refused_when_batches_must_be_cut(name: str, text: str) -> None:
    data = batches(ids(), *long_labels())
    with pytest.raises(SkipPipeError, match=text):
        train(lambda: Model(WHOLE[name]), data, 3, {**PIPELINE, "microbatches": "batch"})
    for way_out in ({"num_microbatches": 1}, {"microbatches": "stack"}):
        assert_same_run(*both(lambda: Model(WHOLE[name]), data, strategy=way_out))


# ------------------------------------------------------------- the user's word


def test_own_weights() -> None:
    def step(model: Any, batch: Any) -> Tensor:
        weights = batch[1].float().sqrt()  # no tensor of the batch says this
        losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[0], reduction="none").mean(1)
        return (losses * weights).sum() / weights.sum()

    data = batches(ids(), torch.arange(28) % 7 + 1)
    own = {"microbatch_weight": lambda batch: batch[1].float().sqrt().sum()}
    assert_same_run(*both(lambda: Model(step), data, strategy=own))


@pytest.mark.parametrize(("weight", "reduction"), [("sum", "sum"), ("samples", "mean")])
def test_weights_by_name(weight: str, reduction: str) -> None:
    def step(model: Any, batch: Any) -> Tensor:
        return entropy(model(batch[0]), batch[0], reduction=reduction) / 50

    assert_same_run(*both(lambda: Model(step), batches(ids()), strategy={"microbatch_weight": weight}))


# ------------------------------------------------------------- what is logged and returned


def log_all(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    loss = entropy(logits, batch[1])
    hits = (logits.argmax(-1) == batch[1]) & (batch[1] != -100)
    model.log("loss", loss, on_epoch=True)
    model.log("hits", hits.sum(), reduce_fx="sum", on_step=True, on_epoch=True)
    model.log("hits_as_number", int(hits.sum()), reduce_fx=torch.sum)
    model.log("largest", logits.max(), reduce_fx="max")
    model.log("smallest", logits.amin(), reduce_fx=torch.min, on_step=True, on_epoch=True)
    model.log("share", hits.float().mean(), batch_size=len(batch[0]))
    model.log("loss_of_constant", loss, batch_size=3, on_step=True, on_epoch=True)
    model.log("as_float", loss.item(), prog_bar=True)
    model.log("constant", 0.1)
    model.log_dict({"a": loss * 2, "b": loss.double()}, on_epoch=True)
    return loss


def metrics(run: Run) -> dict[str, float]:
    return {name: float(value) for name, value in run.trainer.callback_metrics.items()}


def test_logs_are_those_of_one_process() -> None:
    data = batches(ids(), masked(-100))
    found, plain = both(lambda: Model(log_all, log_all), data, val_data=data, num_sanity_val_steps=0)
    assert_same_run(found, plain)
    assert metrics(found) == pytest.approx(metrics(plain), rel=2e-5)
    assert metrics(plain)["hits"] > 0


def test_logs_keep_their_precision() -> None:
    def step(model: Any, batch: Any) -> Tensor:
        loss = entropy(model(batch[0]), batch[1])
        model.log("loss", loss)
        model.log("large", 2**24 + 1)
        return loss

    options = {"precision": "64-true"}
    found, plain = both(lambda: Model(step), batches(ids(), masked(-100)), **options)
    assert metrics(found) == pytest.approx(metrics(plain), rel=1e-12)


def fails_alike(step: Step, text: str) -> None:
    for devices in (1, 3):
        with pytest.raises(Exception, match=text):
            train(lambda: Model(step), batches(ids(), masked(-100)), devices, PIPELINE if devices > 1 else None)


def test_lightning_checks_what_is_logged() -> None:
    def twice(model: Any, batch: Any) -> Tensor:
        loss = entropy(model(batch[0]), batch[1])
        model.log("loss", loss, on_step=True)
        model.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def vector(model: Any, batch: Any) -> Tensor:
        loss = entropy(model(batch[0]), batch[1])
        model.log("losses", loss.repeat(3))
        return loss

    fails_alike(twice, "twice in `training_step` with different arguments")
    fails_alike(vector, "must have a single element")


def outputs(model: Any, batch: Any) -> Any:
    logits = model(batch[0])
    return {
        "numpy": logits.cpu().numpy(),
        "count": int((logits.argmax(-1) == batch[1]).sum()),
        "tensor_count": (logits.argmax(-1) == batch[1]).sum(),
        "samples": len(logits),
        "loss": float(entropy(logits, batch[1])),
        "list": logits.argmax(-1).tolist(),
        "transposed": logits.transpose(0, 1),
        "pair": (logits.mean(), "text"),
        "by_class": torch.bincount(logits.argmax(-1).flatten(), minlength=16),
        "any": bool((logits > 2).any()),
        "nothing": None,
    }


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)) and not all(isinstance(each, int) for each in expected):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_equal(a, b)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert found == pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else found == expected


def test_outputs_are_those_of_one_process() -> None:
    data = batches(ids(), masked(-100))
    step = STEPS["ignored"][0]
    found, plain = both(lambda: Model(step, outputs), data, val_data=data, num_sanity_val_steps=0, max_steps=4)
    assert len(plain.module.seen) == 4
    assert_equal(found.module.seen, plain.module.seen)


class Measured(Model):
    def __init__(self, step: Step) -> None:
        super().__init__(step, step)
        self.mean = MeanMetric()
        self.accuracy = MulticlassAccuracy(16, ignore_index=-100, average="micro")


def update_mean(model: Any, batch: Any) -> Tensor:
    loss = entropy(model(batch[0]), batch[1])
    model.mean.update(loss)
    model.log("mean", model.mean, on_step=False, on_epoch=True)
    return loss


def forward_mean(model: Any, batch: Any) -> Tensor:
    loss = entropy(model(batch[0]), batch[1])
    model.mean(loss)
    model.log("mean", model.mean, on_step=True, on_epoch=True)
    return loss


def count(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    model.accuracy.update(logits.transpose(1, 2), batch[1])
    model.log("accuracy", model.accuracy, on_step=False, on_epoch=True)
    return entropy(logits, batch[1])


@pytest.mark.parametrize(("step", "told"), [(update_mean, 1), (forward_mean, 1), (count, 0)])
def test_metrics_are_those_of_one_process(step: Step, told: int, caplog: pytest.LogCaptureFixture) -> None:
    found, plain = both(lambda: Measured(step), batches(ids(), masked(-100)), max_steps=4)
    assert_same_run(found, plain)
    assert metrics(found) == pytest.approx(metrics(plain), rel=1e-4)
    assert sum("runs once, on the whole batch" in record.getMessage() for record in caplog.records) == told


# ------------------------------------------------- what fits by chance


def mean_of_labels_and_samples(model: Model, batch: Any) -> Tensor:
    """Two means over different things in one sum: no rule for all microbatches."""
    logits, labels = model(batch[0]), batch[1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.1 * (logits - 1).pow(2).mean()


def mean_of_labels(model: Model, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class Even(Model):
    """Says of every token the same until its first step: any mean of its losses is like any other."""

    def on_fit_start(self) -> None:
        nn.init.constant_(self.head.weight, self.constant)
        nn.init.zeros_(self.head.bias)


@pytest.mark.parametrize("constant", [slow(0.0), 0.05])
@pytest.mark.parametrize("step", [mean_of_labels, mean_of_labels_and_samples])
def test_a_head_that_starts_even_hides_no_rule(step: Step, constant: float) -> None:
    class Model(Even):
        pass

    Model.constant = constant
    found, expected = both(lambda: Model(step), batches(ids(), masked(-100)))
    assert_same_run(found, expected)


def positive_labels(model: Model, batch: Any) -> Tensor:
    logits, labels = model(batch[0]), batch[1].clamp(min=0)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)


def labels_of_several_kinds(model: Model, batch: Any) -> Tensor:
    """A count that nothing in the code names."""
    logits, labels = model(batch[0]), batch[1]
    counting = (labels % 3 == 1) & (labels > 0)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none")
    return (losses * counting.flatten()).sum() / counting.sum()


def level(labels: Tensor, counts: Callable[[Tensor], Tensor]) -> Tensor:
    """Reorder the labels of the first batch so that its two halves have as many that count."""
    first = labels[:8].flatten()
    yes, no = first[counts(first)], first[~counts(first)]
    yes, no = yes[: len(yes) // 2 * 2], torch.cat([no, no.new_full((len(yes) % 2,), int(no[0]))])
    halves = [torch.cat([yes[half::2], no[half::2]]) for half in (0, 1)]
    return torch.cat([torch.cat(halves).reshape(8, -1), labels[8:]])


@pytest.mark.parametrize("step", [positive_labels, labels_of_several_kinds])
def test_what_a_first_batch_hides_is_found_in_the_next(step: Step) -> None:
    """Both halves of the first batch have as many labels that count, so a mean over samples fits it, too."""
    counts = {positive_labels: lambda c: c > 0, labels_of_several_kinds: lambda c: (c % 3 == 1) & (c > 0)}[step]
    labels = level(masked(-100) % 7 - torch.where(masked(-100) < 0, 100 + (-100 % 7), 0), counts)
    halves = [int(counts(half).sum()) for half in labels[:8].chunk(2)]
    assert halves[0] == halves[1]
    later = [int(counts(half).sum()) for half in labels[8:16].chunk(2)]
    assert later[0] != later[1]
    found, expected = both(lambda: Model(step), batches(ids(), labels), strategy={"num_microbatches": 2})
    assert_same_run(found, expected)


class Regression(LightningModule):
    """Numbers in and out, of which some are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def training_step(self, batch: Any, index: int) -> Tensor:
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        known = ~torch.isnan(batch[1])
        return F.mse_loss(self.head(hidden)[known], batch[1][known])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_numbers_that_are_missing_for_the_first_time_late_in_the_run_are_not_counted() -> None:
    numbers = torch.randn(240, 9, generator=torch.Generator().manual_seed(3))
    targets = numbers[:, 6:].clone()
    targets[200:][torch.arange(40)[:, None] * 5 % 8 > torch.arange(3) * 2] = float("nan")  # from the 26th batch on
    data = batches(numbers[:, :6], targets)
    assert_same_run(*both(Regression, data, max_steps=30))
