"""A batch of which nothing counts, as without any label, says nothing of others: it runs whole, and they stay cut."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from skippipe_plugin.model.merging import Merging
from tests.grids import slow

from ..support import assert_same_run, train
from .test_losses import PIPELINE, Model, Step, batches, both, entropy, ids, masked, per_token
from .test_values_later import Loss, _Batches, classes, features
from .test_values_later import Model as ByValues

NUM = 64


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """By step: whether its batch was cut."""
    steps: list[bool] = []
    goes_whole = Merging.goes_whole

    def noted(self: Merging, *args: Any, **kwargs: Any) -> bool:
        steps.append(not (found := goes_whole(self, *args, **kwargs)))
        return found

    monkeypatch.setattr(Merging, "goes_whole", noted)
    return steps


def bounded(model: Any, batch: Any) -> Tensor:
    mask = batch[1] != -100
    return (per_token(model, batch) * mask).sum() / mask.sum().clamp(min=1)


def without_nan(model: Any, batch: Any) -> Tensor:
    return entropy(model(batch[0]), batch[1]).nan_to_num()


def with_penalty(model: Any, batch: Any) -> Tensor:
    return without_nan(model, batch) + model.head.weight.pow(2).sum() / 10


def left_out(model: Any, batch: Any) -> Tensor | None:
    return entropy(model(batch[0]), batch[1]) if (batch[1] != -100).any() else None


def logged(step: Step) -> Step:
    def of_batch(model: Any, batch: Any) -> Tensor | None:
        loss = step(model, batch)
        model.log("loss", torch.zeros(()) if loss is None else loss, on_epoch=True)
        return loss

    return of_batch


def even() -> Tensor:
    """Labels of which every sample has as many, so that a mean over samples fits, too."""
    return torch.where(torch.arange(12) < 6, ids(NUM), -100)


def without(labels: Tensor, number: int) -> Tensor:
    """Take all labels from a batch."""
    labels = labels.clone()
    labels[8 * number : 8 * number + 8] = -100
    return labels


@pytest.mark.parametrize("number", [0, slow(1), 5])
@pytest.mark.parametrize("labels", [even, functools.partial(masked, -100, NUM)], ids=["even", "uneven"])
@pytest.mark.parametrize("step", [bounded, slow(without_nan), with_penalty, slow(logged(bounded)), logged(without_nan)])
def test_only_a_batch_without_labels_runs_whole(
    step: Step, labels: Callable[[], Tensor], number: int, cut: list[bool]
) -> None:
    data = batches(ids(NUM), without(labels(), number))
    assert_same_run(*both(lambda: Model(step), data, max_steps=8))
    assert cut == [each != number for each in range(8)]


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_step_may_leave_out_what_has_no_labels(number: int, cut: list[bool]) -> None:
    data = batches(ids(NUM), without(even(), number))
    assert_same_run(*both(lambda: Model(left_out), data, max_steps=7))
    assert all(each for index, each in enumerate(cut) if index != number)


def test_what_a_batch_without_labels_cannot_tell_is_not_forgotten(cut: list[bool]) -> None:
    """Later batches are the first of which samples have unequal numbers of labels."""
    labels = torch.cat([even()[:24], masked(-100, NUM)[24:]])
    assert_same_run(*both(lambda: Model(bounded), batches(ids(NUM), without(labels, 2)), max_steps=8))
    assert cut == [each != 2 for each in range(8)]


def test_a_constant_that_is_logged_leaves_batches_cut(cut: list[bool]) -> None:
    """Any mean of it is the same, in whatever the batches differ."""

    def step(model: Any, batch: Any) -> Tensor:
        model.log("constant", 0.1)
        return bounded(model, batch)

    assert_same_run(*both(lambda: Model(step), batches(ids(NUM), masked(-100, NUM)), max_steps=8))
    assert all(cut)


def test_batches_that_must_be_cut_are_cut_without_labels() -> None:
    data = batches(ids(NUM), without(masked(-100, NUM), 5))
    assert_same_run(*both(lambda: Model(bounded), data, max_steps=8, strategy={"microbatches": "batch"}))


def clipped(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (classes(module, x / max(*x.flatten().tolist(), 1.0), labels) * weights).mean()


def selected(module: Any, x: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (classes(module, x, labels) * weights)[x[:, 0] < 0.6].mean()


@pytest.mark.parametrize("loss", [clipped, selected])
def test_a_first_batch_that_weighs_nothing_hides_no_threshold(loss: Loss, caplog: Any) -> None:
    """The features of the last batches alone are large, and the loss of the first is 0 whatever is done with them."""
    data = [(x, torch.arange(8), torch.full((8,), float(number > 0))) for number, (x, *_) in enumerate(features())]
    make = functools.partial(ByValues, loss, 8)
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, _Batches(data), 3, {**PIPELINE, "num_microbatches": 3}, max_steps=6)
    assert_same_run(found, train(make, _Batches(data), 1, max_steps=6))
    assert "runs once, on the whole batch" in caplog.text
