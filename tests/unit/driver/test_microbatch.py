"""Microbatches: cutting and merging are inverse to each other, for every form of batch."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skippipe_plugin.driver.capture.batches import Cutter, split
from skippipe_plugin.driver.capture.microbatch import merge, split_sizes

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    name: str = "same for all"


def forms(size: int) -> list[Any]:
    x, y = torch.arange(size * 2.0).reshape(size, 2), torch.arange(size)
    return [
        x,
        (x, y),
        [x, y],
        Pair(x, y),
        Sample(x),
        {"x": x, "nested": {"y": [y, x]}},
        OrderedDict(x=x, y=y),
        UserDict({"x": x, "labels": y}),
        {"x": x, "texts": [f"text {index}" for index in range(size)]},
    ]


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, (dict, UserDict)):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, Sample):
        return equal(left.x, right.x) and left.name == right.name
    if isinstance(left, (list, tuple)) and type(left) is type(right):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


@given(st.integers(1, 12), st.integers(1, 8))
def test_what_is_cut_is_put_together_again(size: int, num_microbatches: int) -> None:
    sizes = split_sizes(size, num_microbatches)
    assert sum(sizes) == size
    assert len(sizes) == min(size, num_microbatches)
    assert max(sizes) - min(sizes) <= 1
    for batch in forms(size):
        cut = Cutter().cut(batch, num_microbatches)
        pieces = cut.pieces
        assert cut.sizes == sizes or num_microbatches == 1
        assert all(type(piece) is type(batch) for piece in pieces)
        assert equal(merge(pieces, sizes), batch)


def test_batch_encodings_keep_their_class() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.arange(6).reshape(3, 2)})
    first, second = split(batch, [2, 1])
    assert isinstance(first, transformers.BatchEncoding)
    assert first["input_ids"].tolist() == [[0, 1], [2, 3]]
    assert second.input_ids.tolist() == [[4, 5]]


def test_what_has_no_first_dimension_goes_to_all() -> None:
    pieces = split({"x": torch.zeros(4, 1), "weight": torch.tensor(0.5), "flag": True, "none": None}, [2, 2])
    assert all(piece["weight"] == 0.5 and piece["flag"] is True and piece["none"] is None for piece in pieces)


def test_scalars_are_averaged_by_size() -> None:
    outputs = [{"loss": torch.tensor(1.0), "value": 3.0}, {"loss": torch.tensor(4.0), "value": 6.0}]
    assert merge(outputs, [2, 1]) == {"loss": torch.tensor(2.0), "value": 4.0}


def test_predictions_of_different_lengths_are_listed() -> None:
    rows = merge([torch.zeros(2, 3), torch.zeros(1, 4)], [2, 1])
    assert [len(row) for row in rows] == [3, 3, 4]


def test_model_outputs_are_merged() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    parts = [outputs.CausalLMOutput(loss=torch.tensor(float(size)), logits=torch.zeros(size, 2)) for size in (2, 1)]
    merged = merge(parts, [2, 1])
    assert isinstance(merged, outputs.CausalLMOutput)
    assert merged.logits.shape == (3, 2)
    assert merged.loss == pytest.approx(5 / 3)
