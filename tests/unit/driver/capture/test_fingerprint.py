"""Tensors have one name if, and only if, they are equal bit for bit, and lie in one order in memory."""

import pytest
import torch
from torch import Tensor

from skippipe_plugin.driver.capture import fingerprint
from skippipe_plugin.driver.capture.fingerprint import Fingerprints


def _name(tensor: Tensor) -> str:
    return Fingerprints().of([tensor])[0]


def _some(dtype: torch.dtype, length: int = 5000) -> Tensor:
    drawn = torch.randint(256, (length * dtype.itemsize,), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.uint8).view(dtype) if dtype is not torch.bool else drawn > 99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_equal_tensors_have_one_name(dtype: torch.dtype) -> None:
    tensor = _some(dtype).view(50, 100)
    assert _name(tensor) == _name(tensor.clone()) == _name(tensor.expand(2, 50, 100)[1])
    lying_otherwise = tensor.T.contiguous().T
    assert _name(lying_otherwise) == _name(lying_otherwise.clone())
    others = tensor, lying_otherwise, tensor.T, tensor.flatten(), tensor.view(torch.int8)
    assert len(set(map(_name, others))) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_one_element_makes_another_name(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 4096)
    names = {_name(_some(dtype))}
    for index in range(0, 5000, 137):
        other = _some(dtype)
        other.view(torch.uint8)[index * dtype.itemsize + dtype.itemsize - 1] ^= 1 if dtype is torch.bool else 128
        names.add(_name(other))
    assert len(names) == 1 + len(range(0, 5000, 137))


def test_what_changes_places_makes_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", 4096)
    tensor = _some(torch.float32)
    others = [tensor.roll(1), tensor.roll(1024), tensor.roll(2500), tensor.flip(0)]
    assert len(set(map(_name, (tensor, *others)))) == 5


def test_what_is_short_or_empty_has_a_name() -> None:
    shapes = [(), (0,), (0, 2), (1,), (3,)]
    assert (
        len({_name(torch.zeros(shape, dtype=dtype)) for shape in shapes for dtype in (torch.uint8, torch.half)}) == 10
    )
