"""The order of dimensions in memory is that of what torch makes like a tensor, and travels."""

import pytest
import torch
from torch import Tensor

from skippipe_plugin.driver.capture.side_inputs import Digests
from skippipe_plugin.engine.attributes import have_equal_bits
from skippipe_plugin.engine.handover import pack_tensors, unpack_tensors
from skippipe_plugin.engine.memory_order import from_memory, in_memory, joined, laid, order_of
from skippipe_plugin.engine.stage import inner
from skippipe_plugin.engine.transport import TensorSpec

HOST = torch.device("cpu")


def _last(*shape: int) -> Tensor:
    format_ = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.randn(shape).to(memory_format=format_)


TENSORS = {
    "own order": torch.randn(2, 3, 4),
    "transposed": torch.randn(2, 3, 4).transpose(1, 2),
    "matrix": torch.randn(4, 6).t(),
    "batch second": torch.randn(3, 2, 4).transpose(0, 1),
    "one sample of them": torch.randn(3, 1, 4).transpose(0, 1),
    "channels last": _last(2, 3, 4, 4),
    "one channel": _last(2, 1, 4, 4),
    "one pixel": _last(2, 3, 1, 1),
    "one channel of one": _last(1, 1, 3, 3),
    "five dimensions": _last(2, 3, 2, 4, 5),
    "slice": torch.randn(4, 7, 5)[:, :3],
    "slice of a transposed one": torch.randn(4, 7, 5).transpose(0, 1)[:3],
    "steps": torch.randn(4, 7, 5).permute(2, 0, 1)[:, ::2],
    "expanded": torch.randn(4, 1, 5).expand(4, 6, 5),
    "scalar": torch.randn(()),
    "sizes of one": torch.randn(2, 1, 5, 1),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_it_is_that_of_what_is_made_like_it(tensor: Tensor) -> None:
    strides = torch.empty_like(tensor).stride()
    spec = TensorSpec.of(tensor)
    assert spec.empty(HOST).stride() == laid(tensor, spec.order).stride() == strides
    assert torch.equal(laid(tensor, spec.order), tensor)
    assert torch.equal(from_memory(in_memory(tensor, spec.order), spec.order), tensor)
    assert spec.in_memory.order == ()
    entries, blobs = pack_tensors({"t": tensor})
    came = unpack_tensors(entries, [bytearray(blob) for blob in blobs])["t"]
    assert torch.equal(came, tensor)
    assert came.stride() == strides


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_what_user_code_gets_lies_as_what_came(tensor: Tensor) -> None:
    leaf = laid(tensor, order_of(tensor)).detach().requires_grad_()
    got = inner(leaf)
    assert got.stride() == leaf.stride()
    got.mul_(2).sum().backward()
    assert leaf.grad is not None
    assert in_memory(leaf.grad, order_of(leaf)).is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("permutation", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_pieces_are_put_together_as_they_lie(dim: int, permutation: tuple[int, ...]) -> None:
    whole = torch.randn(4, 4, 4).permute(permutation)
    pieces = torch.split(whole, [2, 1, 1], dim)
    for again in (joined(pieces, dim), joined([each.contiguous() for each in pieces], dim, order_of(whole))):
        assert torch.equal(again, whole)
        assert again.stride() == whole.stride()


def test_values_tell_whether_tensors_are_alike_and_order_too_whether_one_must_be_sent() -> None:
    one = torch.randn(3, 3)
    other = laid(one, (1, 0))
    assert have_equal_bits(one, other)
    assert not have_equal_bits(one, one.t())
    assert len(set(Digests().digests([one, one.clone(), other, one.t()]))) == 3
