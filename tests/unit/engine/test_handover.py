"""Blocks travel with everything that makes them: classes, buffers, ties, flags, dtypes."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.handover import (
    materialize,
    pack_blocks,
    pack_tensors,
    unpack_blocks,
    unpack_tensors,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(6).reshape(2, 3).t())  # not contiguous
        self.plain = torch.ones(2)
        self.first.bias.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.second(self.first(hidden)) + self.plain.sum()


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))
def test_tensors_of_every_kind_survive(dtype: torch.dtype, shape: list[int]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    entries, blobs = pack_tensors({"t": tensor})
    result = unpack_tensors(entries, [bytearray(blob) for blob in blobs])["t"]
    assert result.dtype == dtype
    assert torch.equal(result, tensor)


def test_blocks_survive_whole() -> None:
    block = Tied().eval()
    fields, blobs = pack_blocks({5: block})
    (index, copy), *rest = unpack_blocks(fields, [bytearray(blob) for blob in blobs]).items()
    assert (index, rest, copy.training) == (5, [], False)
    assert copy.first.weight is copy.second.weight
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in block.parameters()]
    assert all(map(torch.equal, copy.state_dict().values(), block.state_dict().values()))
    hidden = torch.randn(2, 3)
    assert torch.equal(copy(hidden), block(hidden))


def test_weights_are_not_in_the_pickle() -> None:
    block = nn.Linear(300, 300)
    _, blobs = pack_blocks({0: block})
    assert len(blobs[0]) < 5000


def test_classes_of_a_script_travel_by_value() -> None:
    namespace: dict = {"nn": nn, "__name__": "__main__"}
    exec("class Local(nn.Linear):\n    def forward(self, x):\n        return super().forward(x) * 2", namespace)
    fields, blobs = pack_blocks({0: namespace["Local"](2, 2)})
    copy = unpack_blocks(fields, blobs)[0]
    assert type(copy).__name__ == "Local"
    assert copy(torch.ones(1, 2)).shape == (1, 2)


def test_the_driver_leaves_its_scripts_classes_as_they_are() -> None:
    """It takes structures apart that it has packed, when blocks move: a class made anew would be another."""
    cls = type("Local", (nn.Module,), {"__module__": "__main__", "forward": lambda self, x: x * 2})
    before = dict(vars(cls))
    packed = pack_blocks({0: cls(), 1: cls()}, values=False)
    found = unpack_blocks(*packed, by_own_classes=True)
    assert [type(block) for block in found.values()] == [cls, cls]
    assert all(vars(cls)[name] is value for name, value in before.items())


def test_what_cannot_be_pickled_is_named() -> None:
    block = nn.Linear(2, 2)
    block.lock = threading.Lock()
    with pytest.raises(SkipPipeError, match=r"cannot be sent to a worker.*lock"):
        pack_blocks({0: block})


def test_meta_blocks_get_their_initial_values_where_they_land() -> None:
    with torch.device("meta"):
        block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    copy = unpack_blocks(*pack_blocks({0: block}))[0]
    assert all(parameter.is_meta for parameter in copy.parameters())
    materialize(copy, torch.device("cpu"))
    assert copy(torch.zeros(1, 4)).isfinite().all()
    assert torch.equal(copy[1].weight, torch.ones(4))


def test_meta_blocks_without_initial_values_are_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2, device="meta"))

    with pytest.raises(SkipPipeError, match="has no reset_parameters"):
        materialize(Bare(), torch.device("cpu"))
