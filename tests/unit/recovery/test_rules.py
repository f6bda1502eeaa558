"""CheckFree's rules against its formula, written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skippipe_plugin.recovery import Neighbour, rebuild_block, rebuild_stage
from skippipe_plugin.recovery.rules import opposite


def stage(*values: float, norm: float = 1.0) -> Neighbour:
    return Neighbour([{"w": torch.tensor([value, 2 * value])} for value in values], norm)


def weights(states: list[dict]) -> list[float]:
    return [float(state["w"][0]) for state in states]


@pytest.mark.parametrize(
    ("rule", "before_share"), [("norm", 3.0001 / 4.0002), ("squared", 9.0001 / 10.0002), ("mean", 0.5), ("copy", 1.0)]
)
def test_neighbours_are_weighted_by_their_gradients(rule, before_share: float) -> None:
    before, after = stage(1.0, 2.0, norm=3.0), stage(5.0, 6.0, norm=1.0)
    expected = [before_share * 1 + (1 - before_share) * 5, before_share * 2 + (1 - before_share) * 6]
    assert weights(rebuild_stage(2, before, after, rule)) == pytest.approx(expected)


def test_a_stage_at_an_end_is_the_copy_of_its_neighbour() -> None:
    assert weights(rebuild_stage(2, None, stage(5.0, 6.0))) == [5.0, 6.0]
    assert weights(rebuild_stage(2, stage(1.0, 2.0), None, "copy")) == [1.0, 2.0]
    assert weights(rebuild_stage(2, None, stage(1.0, 2.0), "copy")) == [1.0, 2.0]


def test_two_neighbours_that_never_had_gradients_count_alike() -> None:
    assert weights(rebuild_stage(1, stage(1.0, norm=0.0), stage(2.0, norm=0.0))) == pytest.approx([1.5])


def test_uneven_stages_are_averaged_block_by_block_with_the_nearest_blocks() -> None:
    # Relative depths: 1/2 of one block lies between the two of the others; the ones that touch it are nearer.
    assert weights(rebuild_stage(1, stage(1.0, 2.0), stage(4.0, 8.0), "mean")) == [3.0]
    assert weights(rebuild_stage(3, stage(1.0), stage(3.0, 5.0, 7.0), "mean")) == [2.0, 3.0, 4.0]


@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_every_block_finds_an_opposite_in_order(num_blocks: int, num_others: int, ahead: bool) -> None:
    found = [opposite(block, num_blocks, num_others, ahead=ahead) for block in range(num_blocks)]
    assert found == sorted(found)
    assert all(0 <= other < num_others for other in found)
    if num_blocks == num_others:
        assert found == list(range(num_blocks))
    for block, other in enumerate(found):
        depth = (block + 0.5) / num_blocks
        distance = min(abs(depth - (j + 0.5) / num_others) for j in range(num_others))
        assert abs(depth - (other + 0.5) / num_others) == pytest.approx(distance)


def test_integers_are_copied_and_dtypes_stay() -> None:
    first = {"count": torch.tensor(3), "mask": torch.tensor([True]), "w": torch.ones(1, dtype=torch.bfloat16)}
    second = {"count": torch.tensor(9), "mask": torch.tensor([False]), "w": torch.zeros(1, dtype=torch.bfloat16)}
    merged = rebuild_block([first, second], [1.0, 1.0])
    assert (merged["count"], merged["mask"], merged["w"]) == (3, True, 0.5)
    assert merged["w"].dtype == torch.bfloat16


@given(st.lists(st.floats(-10, 10, width=32), min_size=1), st.floats(0, 10), st.floats(0, 10))
def test_equal_neighbours_give_themselves(values: list[float], before: float, after: float) -> None:
    state = {"w": torch.tensor(values)}
    (rebuilt,) = rebuild_stage(1, Neighbour([state], before), Neighbour([state], after))
    assert torch.equal(rebuilt["w"], state["w"])
    assert rebuilt["w"] is not state["w"]


def test_what_cannot_be_averaged_is_named() -> None:
    with pytest.raises(ValueError, match="no stage is left"):
        rebuild_stage(1, None, None)
    with pytest.raises(ValueError, match=r"w has shape \(2,\) .* and \(3,\)"):
        rebuild_block([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"differ in \['b'\]"):
        rebuild_block([{"w": torch.zeros(2)}, {"w": torch.zeros(2), "b": torch.zeros(2)}], [1.0, 1.0])
