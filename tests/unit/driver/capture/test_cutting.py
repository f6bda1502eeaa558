"""One call of the stack becomes several; which dimension is the batch's is found, never guessed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skippipe_plugin.driver.capture.arguments import SideInputs
from skippipe_plugin.driver.capture.cutting import (
    Axis,
    CallForm,
    Cut,
    NotCuttable,
    cut_call,
    find_cut,
    kind_of,
    likely_cuts,
)
from skippipe_plugin.driver.capture.entered import EnteredStack
from skippipe_plugin.driver.capture.growing import sample_counts, with_more_samples
from skippipe_plugin.driver.capture.stack_call import StackCall
from skippipe_plugin.engine.arguments import SideInput, Template
from skippipe_plugin.engine.call import Ambient
from skippipe_plugin.engine.transport import TensorSpec

GRAD = Ambient(grad=True, inference=False, autocast=())


def call(hidden: Tensor, *sides: Tensor, constants: tuple[Any, ...] = ()) -> StackCall:
    slots = tuple(map(SideInput, range(len(sides))))
    template = Template((None, *slots, *constants), {}, 0)
    spec = TensorSpec.of(hidden)
    return StackCall(EnteredStack(hidden), GRAD, SideInputs(list(sides)), [template], [0, 0], specs=[spec, spec, spec])


def form(*shapes: tuple[int, ...], constants: tuple[Any, ...] = ()) -> CallForm:
    hidden, *sides = map(torch.zeros, shapes)
    return CallForm.of(call(hidden, *sides, constants=constants))


@pytest.mark.parametrize(
    ("whole", "other", "hidden", "sides"),
    [
        ([(8, 5, 3)], [(9, 5, 3)], Axis(0, 1), []),
        ([(5, 8, 3)], [(5, 9, 3)], Axis(1, 1), []),
        ([(16, 5, 3)], [(18, 5, 3)], Axis(0, 2), []),
        ([(8, 8, 8)], [(8, 8, 9)], Axis(2, 1), []),
        ([(8, 8, 3), (8, 8), (8, 8)], [(9, 8, 3), (8, 8), (9, 8)], Axis(0, 1), [None, Axis(0, 1)]),
        (
            [(5, 8, 3), (8, 1, 5, 5), (1, 1, 5, 5)],
            [(5, 9, 3), (9, 1, 5, 5), (1, 1, 5, 5)],
            Axis(1, 1),
            [Axis(0, 1), None],
        ),
    ],
)
def test_the_dimension_that_grows_with_the_samples_is_the_batchs(
    whole: Any, other: Any, hidden: Axis, sides: list[Axis | None]
) -> None:
    assert find_cut(form(*whole), form(*other), 8, 9) == Cut((hidden,) * 3, tuple(sides))


@pytest.mark.parametrize(
    ("whole", "other", "reason"),
    [
        ([(40, 3)], [(40, 3)], "no dimension of the hidden states"),
        ([(37, 3)], [(41, 3)], "becomes"),  # packed sequences
        ([(8, 8, 3)], [(9, 9, 3)], "becomes"),
        ([(8, 5, 3), (9,)], [(9, 5, 3), (10,)], "becomes"),  # offsets of packed sequences
        ([(16, 3), (8, 3)], [(18, 3), (9, 3)], "each sample has 2 rows in the hidden states"),
        ([(8, 3)], [(9, 3, 1)], "dimensions"),
        ([(8, 3)], [(9, 3), (9,)], "how the blocks are called"),
    ],
)
def test_what_the_forms_do_not_tell_is_not_cut(whole: Any, other: Any, reason: str) -> None:
    with pytest.raises(NotCuttable, match=reason):
        find_cut(form(*whole), form(*other), 8, 9)


def test_a_constant_that_counts_samples_is_not_cut() -> None:
    with pytest.raises(NotCuttable, match="are called with the value 8, which 9 samples make 9"):
        find_cut(form((8, 3), constants=(8, "a")), form((9, 3), constants=(9, "a")), 8, 9)
    assert find_cut(form((8, 3), constants=(5, None)), form((9, 3), constants=(5, None)), 8, 9)


def test_the_pieces_are_those_of_the_whole() -> None:
    hidden, mask, shared = torch.randn(5, 16, 3, requires_grad=True), torch.randn(16, 5), torch.randn(16, 16)
    cut = Cut((Axis(1, 2),) * 3, (Axis(0, 2), None))
    parts = cut_call(call(hidden, mask, shared), cut, [3, 3, 2])
    assert torch.equal(cut.hidden.join([part.hidden for part in parts], ()), hidden)
    assert torch.equal(torch.cat([part.side_inputs[0] for part in parts]), mask)
    assert [part.hidden.shape[1] for part in parts] == [6, 6, 4]
    assert all(part.side_inputs[1] is shared for part in parts)
    assert all(part.hidden.requires_grad and part.hidden.is_leaf for part in parts)
    assert [part.specs for part in parts] == [[TensorSpec.of(part.hidden)] for part in parts]


def test_a_kind_is_which_sizes_are_equal() -> None:
    def kind(batch: int, length: int, *constants: Any) -> Any:
        sides = torch.zeros(batch, length), torch.zeros(length, length)
        return kind_of(call(torch.zeros(batch, length, 64), *sides, constants=constants), [batch])

    assert kind(8, 10) == kind(8, 11) == kind(5, 30)
    assert kind(8, 10) != kind(8, 8)
    assert kind(8, 10, 10) == kind(8, 12, 12)
    assert kind(8, 10, 10) != kind(8, 10, 8)
    assert kind(8, 10, True) != kind(8, 10, False)


def test_a_batch_grows_by_its_own_samples() -> None:
    batch = {
        "x": torch.arange(6).view(3, 2),
        "pair": (torch.tensor([1, 2, 3]), ["a", "b", "c"]),
        "n": 3,
        "w": torch.ones(2),
    }
    grown = with_more_samples(batch, 3, 1)
    assert grown["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert grown["pair"][0].tolist() == [1, 2, 3, 1]
    assert grown["pair"][1] == ["a", "b", "c", "a"]
    assert (grown["n"], grown["w"].tolist()) == (3, [1, 1])
    assert batch["x"].shape == (3, 2)


def test_samples_may_be_counted_in_several_ways() -> None:
    assert sample_counts({"x": torch.ones(8, 2), "y": torch.ones(8), "w": torch.ones(3), "s": torch.tensor(1)}) == [
        8,
        3,
    ]
    assert sorted(sample_counts([torch.ones(5), torch.ones(5), torch.ones(5)])) == [3, 5]
    assert sample_counts("text") == []


def test_likely_cuts_begin_with_what_is_likely() -> None:
    whole = CallForm(((8, 8, 4), (8, 8, 4)), ((1, 8, 4), (8, 1, 8, 8)), (), ())
    (first, *_), expected = likely_cuts(whole, [8]), Cut((Axis(0, 1), Axis(0, 1)), (None, Axis(0, 1)))
    assert first == (8, expected)
    assert (8, Cut((Axis(1, 1), Axis(1, 1)), (Axis(1, 1), None))) in likely_cuts(whole, [8])


def test_nothing_is_likely_without_a_dimension_of_the_samples() -> None:
    with pytest.raises(NotCuttable, match=r"no dimension of the hidden states \[6, 4\] is that of the 8 samples"):
        likely_cuts(CallForm(((6, 4), (6, 4)), (), (), ()), [8])
