"""What a step counts in buffers is taken back when the step does not count."""

import pytest
import torch
from torch import nn

from skippipe_plugin.worker.buffers import BlockBuffers


class Counts(nn.Module):
    """Counts in three ways: in place, by another tensor, not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("total", torch.zeros(1))
        self.register_buffer("still", torch.ones(2))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + len(x)
        return self.norm(x)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_a_step_that_is_given_up_leaves_no_trace(steps_before: int) -> None:
    torch.manual_seed(0)
    module = Counts()
    buffers = BlockBuffers([module])
    for _ in range(steps_before):
        buffers.note()
        module(torch.randn(4, 3))
        buffers.keep()
    before = state(module)
    for _ in range(2):  # it may be given up twice
        buffers.note()
        module(torch.randn(4, 3))
        assert not torch.equal(module.total, before["total"])
        buffers.restore()
        torch.testing.assert_close(state(module), before, rtol=0, atol=0)
    assert float(module.total) == 4 * steps_before


def test_a_step_that_counts_is_kept() -> None:
    module = Counts()
    buffers = BlockBuffers([module])
    buffers.note()
    module(torch.randn(4, 3))
    buffers.keep()
    after = state(module)
    buffers.restore()
    torch.testing.assert_close(state(module), after, rtol=0, atol=0)
