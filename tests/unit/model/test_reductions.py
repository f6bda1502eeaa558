"""Which rules fit what steps compute for a batch and for its microbatches, and what they make of other results."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.driver.capture.batches import split
from skippipe_plugin.model.counting import Counted, Samples, View, Watch, candidates
from skippipe_plugin.model.reductions import (
    MISSING,
    Joined,
    Leaf,
    Mean,
    Plan,
    Sum,
    Unsettled,
    check_settled,
    find_plan,
    merge,
    problems,
    weighting_of,
)

SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def view_of(batch: Any, sizes: list[int]) -> View:
    return View(batch, split(batch, sizes), sizes)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weightings(view: View) -> list[Any]:
    return [Samples(), *(each for each in candidates(view, ()) if not view.is_plain(each))]


def plan_of(function: Any, batch: Any, sizes: list[int], known: Plan | None = None) -> tuple[Plan, View]:
    view = view_of(batch, sizes)
    parts = [function(piece) for piece in view.pieces]
    return find_plan(function(batch), parts, view, weightings(view), known), view


FUNCTIONS: dict[str, Any] = {
    "mean": lambda b: b["x"].mean(),
    "number": lambda b: b["x"].mean().item(),
    "sum": lambda b: b["x"].sum(),
    "ignored": lambda b: b["x"][b["y"] != -100].mean(),
    "shifted": lambda b: b["x"][:, 1:][b["y"][:, 1:] != -100].mean(),
    "per_sample": lambda b: b["x"].abs().sum(1).sqrt().mean(),
    "count": lambda b: int((b["x"] > 0).sum()),
    "largest": lambda b: b["x"].amax(),
    "smallest": lambda b: b["x"].min().item(),
    "rows": lambda b: b["x"] * 2,
    "turned": lambda b: b["x"].T,
    "array": lambda b: b["x"].numpy(),
    "list": lambda b: b["x"][:, 0].tolist(),
    "by_column": lambda b: b["x"].mean(0),
    "constant": lambda b: 0.1,
    "text": lambda b: "text",
    "any": lambda b: bool((b["x"] > 2).any()),
    "nested": lambda b: {"a": (b["x"].mean(), [b["x"].sum()]), "b": None},
}


def batch_of(sizes: list[int], seed: int) -> dict[str, torch.Tensor]:
    count = sum(sizes)
    labels = torch.where(random(count, 6, seed=seed + 1) > 0.3, 5, -100)
    labels[:, 3] = 5
    return {"x": random(count, 6, seed=seed), "y": labels}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, others=SIZES, seed=st.integers(0, 1000))
def test_what_was_found_holds_for_other_batches(name: str, sizes: list[int], others: list[int], seed: int) -> None:
    function = FUNCTIONS[name]
    plan, view = plan_of(function, batch_of(sizes, seed), sizes)
    assert not problems(plan, name)
    other = batch_of(others, seed + 7)
    view = view_of(other, others)
    expected, parts = function(other), [function(piece) for piece in view.pieces]
    try:
        found = merge(plan, parts, view)
    except Unsettled:  # a small batch leaves several rules: the other one decides
        plan, view = plan_of(function, other, others, plan)
        found = merge(plan, parts, view)
    torch.testing.assert_close(found, expected) if isinstance(expected, torch.Tensor) else check(found, expected)


def check(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert float(found["a"][0]) == pytest.approx(float(expected["a"][0]))
        assert float(found["a"][1][0]) == pytest.approx(float(expected["a"][1][0]))
    else:
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    "function",
    [lambda b: b["x"].mean().exp(), lambda b: b["x"].std(), lambda b: b["x"].sum() ** 2, lambda b: b["x"] - b["x"][0]],
)
def test_what_does_not_reduce_is_found_out(function: Any) -> None:
    sizes = [2, 2, 2]
    plan, _ = plan_of(function, batch_of(sizes, 0), sizes)
    assert problems(plan, "the loss")


def test_a_later_batch_tells_what_the_first_left_open() -> None:
    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x"][batch["y"] != -100].mean()

    sizes = [2, 2]
    plain = batch_of(sizes, 0) | {"y": torch.full((4, 6), 5)}
    plan, view = plan_of(loss, plain, sizes)
    assert weighting_of(plan, view) == Mean(Samples())
    watch = Watch()
    watch.learn(view, ())
    assert not watch.is_new(view_of(plain, sizes))
    other = view_of(batch_of(sizes, 3), sizes)
    assert watch.is_new(other)
    plan, view = plan_of(loss, batch_of(sizes, 3), sizes, plan)
    rule = weighting_of(plan, view)
    assert isinstance(rule, Mean)
    assert isinstance(rule.weighting, Counted)
    assert (rule.weighting.path, rule.weighting.value, rule.weighting.trim) == ("batch['y']", -100, "")


def test_equal_numbers_of_labels_leave_two_readings_until_they_differ() -> None:
    sizes = [1, 1]
    x, y = random(2, 6), torch.tensor([[5, 5, 5, -100, -100, -100]] * 2)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["x"][batch["y"] != -100].mean()

    plan, view = plan_of(loss, {"x": x, "y": y}, sizes)
    assert weighting_of(plan, view) == Mean(Samples())
    y = torch.tensor([[5, 5, 5, 5, -100, -100], [5, 5, 5, -100, -100, -100]])
    with pytest.raises(Unsettled, match="both fit so far"):
        weighting_of(plan, view_of({"x": x, "y": y}, sizes))


def test_zeros_leave_the_sum_open() -> None:
    view = view_of({"x": random(4, 2)}, [2, 2])
    plan = find_plan(0, [0, 0], view, [Samples()])
    with pytest.raises(Unsettled):
        merge(plan, [3, 3], view)
    assert merge(find_plan(6, [3, 3], view, [Samples()], plan), [1, 4], view) == 5


def test_other_forms_than_before_are_unsettled() -> None:
    view = view_of({"x": random(4, 2)}, [2, 2])
    plan = find_plan({"a": 1.0}, [{"a": 1.0}, {"a": 1.0}], view, [Samples()])
    with pytest.raises(Unsettled):
        merge(plan, [{"b": 1.0}, {"b": 1.0}], view)


def test_a_microbatch_without_a_result_weighs_nothing() -> None:
    view = view_of({"x": random(4, 2)}, [1, 3])
    plan = find_plan(2.0, [MISSING, 2.0], view, [Samples()])
    assert merge(plan, [MISSING, 4.0], view) == 4.0


def test_means_of_numbers_that_are_not_finite_tell_nothing() -> None:
    view = view_of({"x": random(4, 2)}, [2, 2])
    plan = find_plan(float("nan"), [float("nan"), 1.0], view, [Samples()])
    assert isinstance(plan, Leaf)
    assert {Sum(), Mean(Samples())} <= set(plan.rules)


def test_tensors_are_joined_along_the_dimension_that_was_cut() -> None:
    view = view_of({"x": random(4, 2)}, [2, 2])
    whole = random(3, 4, 2)
    assert find_plan(whole, [whole[:, :2], whole[:, 2:]], view, [Samples()]) == Leaf(
        (Joined(1),), frozenset({Joined(0), Joined(2)})
    )


def test_means_whose_shares_are_alike_within_rounding_are_one_to_a_result_of_16_bits() -> None:
    labels = torch.ones(8, 100, dtype=torch.long)
    labels[1, -1] = -100
    view = View(labels, labels.chunk(4), (2, 2, 2, 2))
    rules = (Mean(Samples()), Mean(Counted("batch", "ne", -100)))
    check_settled(Leaf(rules, is_rough=True), view)
    assert weighting_of(Leaf(rules, is_rough=True), view) == rules[0]
    with pytest.raises(Unsettled):
        check_settled(Leaf(rules), view)
    labels[1] = -100
    with pytest.raises(Unsettled):
        check_settled(Leaf(rules, is_rough=True), View(labels, labels.chunk(4), (2, 2, 2, 2)))
