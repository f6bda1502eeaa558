"""What the losses of drivers weigh that have unequal numbers of labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.model.counting import Counted, Samples
from skippipe_plugin.model.reductions import Leaf, Mean
from skippipe_plugin.model.shares import loss_weights, whole_share
from skippipe_plugin.model.trials import LOSS
from skippipe_plugin.model.weight import view_of

LABELS = Mean(Counted("batch", "ne", -100))


def merging(counts: list[int], *rules: Any) -> Any:
    """A batch of two microbatches of two samples, which have so many labels."""
    batch = torch.where(torch.arange(4) < torch.tensor(counts)[:, None], 1, -100)
    view = view_of(batch, [batch[:2], batch[2:]], [2, 2], None)
    plans = {LOSS: Leaf(rules or (LABELS,))}
    question = SimpleNamespace(view=view, kind="training_step", uncut="")
    return SimpleNamespace(weight=None, answer=SimpleNamespace(plans=plans), question=question)


def uncut() -> Any:
    """A batch that cannot be cut."""
    view = view_of(torch.ones(4), [torch.ones(4)], [1], None)
    question = SimpleNamespace(view=view, kind="training_step", uncut="it is packed")
    return SimpleNamespace(weight=None, answer=None, question=question, asking=SimpleNamespace(is_news=lambda *_: True))


def agreeing(*others: Any) -> Any:
    """Give another driver's values, in the order in which they are asked for."""
    coming = iter(others)
    return lambda own: [own, next(coming)]


def test_each_microbatch_weighs_what_its_labels_are_among_those_of_all_drivers() -> None:
    found = loss_weights(merging([1, 2, 3, 4]), agreeing(LABELS, 10))
    assert found.weights == pytest.approx((3 / 20, 7 / 20))
    assert whole_share(merging([1, 2, 3, 4]), agreeing(LABELS, 30)) == pytest.approx(1 / 4)


def test_a_driver_without_labels_weighs_nothing() -> None:
    assert loss_weights(merging([0, 0, 0, 0]), agreeing(LABELS, 10)).weights == (0.0, 0.0)
    assert whole_share(merging([0, 0, 0, 0]), agreeing(LABELS, 10)) == 0.0
    assert whole_share(merging([1, 1, 1, 1]), agreeing(LABELS, 0)) == 1.0


def test_without_labels_anywhere_samples_count() -> None:
    assert loss_weights(merging([0, 0, 0, 0]), agreeing(LABELS, 0)).weights == (0.25, 0.25)


def test_one_driver_may_not_tell_labels_from_samples() -> None:
    found = loss_weights(merging([2, 2, 2, 2], Mean(Samples())), agreeing(LABELS, 8))
    assert found.weights == pytest.approx((0.25, 0.25))


def test_drivers_with_other_rules() -> None:
    other = Mean(Counted("batch", "ne", 0))
    with pytest.raises(SkipPipeError, match="different reductions"):
        loss_weights(merging([1, 2, 3, 4]), agreeing(other))
    assert whole_share(merging([1, 2, 3, 4]), agreeing(other)) == 0.5
    assert whole_share(merging([1, 2, 3, 4]), agreeing(None)) == 0.5


@pytest.mark.parametrize("other", [None, LABELS, Mean(Samples())])
def test_batches_that_cannot_be_cut_weigh_alike_which_is_said(other: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert whole_share(uncut(), agreeing(other)) == 0.5
    assert "count alike" in caplog.text
    caplog.clear()
    assert whole_share(merging([1, 2, 3, 4]), agreeing(None)) == 0.5
    assert whole_share(uncut(), lambda own: [own]) == 1.0
    assert not caplog.text
