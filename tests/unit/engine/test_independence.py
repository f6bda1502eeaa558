"""Blocks that compute the same for a part of a batch, and those that do not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.engine.call import Ambient, Call, CallSpec
from skippipe_plugin.engine.independence import Parts, is_independent

CALL = Call(CallSpec((), (), (), (), Ambient(False, False, ())), (), 0)


class Mixing(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + h.mean(0, keepdim=True)


class Picky(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        assert len(h) == 8
        return h


class Moved(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.transpose(0, 1) * 2


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(4, 4), True),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), True),
        (nn.BatchNorm1d(4), False),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)), False),
        (nn.BatchNorm1d(4).eval(), True),
        (Mixing(), False),
        (Mixing().eval(), False),
        (Picky(), False),
    ],
)
def test_parts(module: Any, expected: bool) -> None:
    before = [each.training for each in module.modules()]
    parts = Parts((CALL, CALL), (5, 3), 0, 0)
    with torch.no_grad():
        assert is_independent(module, lambda _, h: module(h), CALL, torch.randn(8, 4), parts) == expected
    assert [each.training for each in module.modules()] == before


def test_a_dimension_that_moves() -> None:
    hidden = torch.randn(8, 4, 3)
    assert is_independent(Moved(), lambda _, h: Moved()(h), CALL, hidden, Parts((CALL, CALL), (5, 3), 0, 1))
    assert not is_independent(Moved(), lambda _, h: Moved()(h), CALL, hidden, Parts((CALL, CALL), (5, 3), 0, 0))
