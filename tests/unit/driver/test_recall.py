"""Stages that died together with the driver: rebuilt from the nearest that did not."""

from typing import Any

import pytest
import torch

from skippipe_plugin.driver.recall import Recalled, rebuilt
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.wire import tensor_key, tensor_name

STAGES = {1: [0, 1], 2: [2], 3: [3], 4: [4, 5]}
NORMS = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def found(*lost: int) -> Recalled:
    """What was found when some stages were not: block k holds the number k."""
    empty: dict[str, Any] = {}
    return Recalled(
        fit=1,
        step=7,
        pending=None,
        base={"blocks": {block: f"blocks.{block}" for blocks in STAGES.values() for block in blocks}},
        tensors=empty,
        progress=empty,
        weights={
            tensor_name(block, "weight"): torch.full((2,), float(block))
            for stage, blocks in STAGES.items()
            if stage not in lost
            for block in blocks
        },
        optimizer={},
        living=[(STAGES[stage], norm) for stage, norm in NORMS.items() if stage not in lost],
    )


def blocks_of(recalled: Recalled) -> dict[int, float]:
    return {tensor_key(key)[0]: float(tensor[0]) for key, tensor in recalled.weights.items()}


def between(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The average of two (value, gradient norm), as CheckFree's code weights them."""
    weights = before[1] + 1e-4, after[1] + 1e-4
    return (before[0] * weights[0] + after[0] * weights[1]) / sum(weights)


def test_what_was_found_stays() -> None:
    recalled = found()
    assert rebuilt(recalled, "norm") == (recalled, {})
    assert rebuilt(recalled, None) == (recalled, {})


@pytest.mark.parametrize(
    ("lost", "expected", "sources"),
    [
        ([2], {2: between((1, 1.0), (3, 3.0))}, {range(2, 3): "neighbours"}),
        ([2, 3], {2: between((0, 1.0), (4, 4.0)), 3: between((1, 1.0), (5, 4.0))}, {range(2, 4): "neighbours"}),
        ([1], {0: 2.0, 1: 2.0}, {range(2): "copy"}),
        ([3, 4], {3: 2.0, 4: 2.0, 5: 2.0}, {range(3, 6): "copy"}),
        ([1, 3], {0: 2.0, 1: 2.0, 3: between((2, 2.0), (4, 4.0))}, {range(2): "copy", range(3, 4): "neighbours"}),
    ],
)
def test_lost_stages_come_from_the_nearest_living_ones(
    lost: list[int], expected: dict[int, float], sources: dict[range, str]
) -> None:
    recalled, came_from = rebuilt(found(*lost), "norm")
    assert came_from == sources
    assert sorted(blocks_of(recalled)) == list(range(6))
    for block, value in blocks_of(recalled).items():
        assert value == pytest.approx(expected.get(block, block))


def test_the_rule_counts() -> None:
    assert blocks_of(rebuilt(found(2), "mean")[0])[2] == pytest.approx(2.0)
    assert rebuilt(found(2), "copy")[1] == {range(2, 3): "copy"}


@pytest.mark.parametrize(("lost", "rule"), [([2], None), ([1, 2, 3, 4], "norm")])
def test_what_cannot_be_rebuilt_is_an_error_that_names_the_blocks(lost: list[int], rule: Any) -> None:
    blocks = [block for stage in lost for block in STAGES[stage]]
    with pytest.raises(SkipPipeError, match=rf"held the blocks \{blocks}, so .* from the last checkpoint"):
        rebuilt(found(*lost), rule)
