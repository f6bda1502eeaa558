"""Which of several rules that fit a loss of 16 bits its gradient refutes."""

import torch

from skippipe_plugin.model.counting import Counted, Samples, View
from skippipe_plugin.model.reductions import Leaf, Mean, Sum
from skippipe_plugin.model.slopes import Slopes, refuted_by

SAMPLES, LABELS = Mean(Samples()), Mean(Counted("batch", "ne", -100))
GRADIENTS = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
"""Of each sample, in the loss of its microbatch."""


def view(labels: list[int]) -> View:
    batch = torch.tensor(labels)
    return View(batch, batch.chunk(4), (2, 2, 2, 2))


def slopes(shares: list[float]) -> tuple[Slopes, list[Slopes]]:
    """The gradient of the batch's loss, of 16 bits, and those of the microbatches', a fourth of which was asked for."""
    whole = (GRADIENTS * torch.tensor(shares).repeat_interleave(2)[:, None]).bfloat16()
    parts = [Slopes(((piece / 4).bfloat16(),), (), 0.25) for piece in GRADIENTS.chunk(4)]
    return Slopes((whole,), (), 1.0), parts


def test_means_whose_shares_are_not_the_gradients_are_refuted() -> None:
    plan, batch = Leaf((SAMPLES, LABELS)), view([1, -100, 1, 1, 1, 1, 1, 1])
    assert refuted_by(*slopes([0.25] * 4), [0], plan, batch) == {LABELS}
    assert refuted_by(*slopes([1 / 7, *[2 / 7] * 3]), [0], plan, batch) == {SAMPLES}
    assert refuted_by(*slopes([1.0] * 4), [0], Leaf((SAMPLES, LABELS, Sum())), batch) == {SAMPLES, LABELS}


def test_what_is_alike_within_rounding_stays() -> None:
    plan = Leaf((SAMPLES, Mean(Counted("batch", "total"))))
    assert not refuted_by(*slopes([0.25] * 4), [0], plan, view([100, 100, 101, 100, 100, 100, 100, 99]))


def test_one_rule_is_left_whatever_the_gradient() -> None:
    assert not refuted_by(*slopes([0.9, 0.2, 0.1, 0.4]), [0], Leaf((SAMPLES,)), view([1] * 8))


def test_a_microbatch_without_a_gradient_tells_nothing() -> None:
    whole, parts = slopes([0.25] * 4)
    still = [Slopes((torch.zeros(2, 50),), (), 0.25), *parts[1:]]
    assert refuted_by(whole, still, [0], Leaf((SAMPLES, LABELS)), view([1, -100, 1, 1, 1, 1, 1, 1])) == {LABELS}
