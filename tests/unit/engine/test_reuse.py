"""The backward of a stage in halves, where a weight is used again: of blocks that share it, or within a block."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.engine.arguments import Template
from skippipe_plugin.engine.call import Ambient, BlockMode, Call, CallSpec, Hop
from skippipe_plugin.engine.reuse import uses_again
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.transport import TensorSpec

HOP = Hop(TensorSpec((3, 4), torch.float32), True)


class Block(nn.Module):
    def __init__(self, linear: nn.Linear | None = None, *, again: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.again = nn.LayerNorm(4), linear or nn.Linear(4, 4), again

    def forward(self, h: Tensor) -> Tensor:
        h = h + torch.tanh(self.linear(self.norm(h)))
        return self.linear(h).sigmoid() if self.again else h


def apart() -> list[nn.Module]:
    return [Block(), Block()]


def one_linear() -> list[nn.Module]:
    linear = nn.Linear(4, 4)
    return [Block(linear), Block(linear), Block()]


def one_block() -> list[nn.Module]:
    return [Block()] * 3


def twice_in_a_block() -> list[nn.Module]:
    return [Block(again=True), Block()]


@pytest.mark.parametrize("make", [apart, one_linear, one_block, twice_in_a_block])
@pytest.mark.parametrize("halves", [False, True])
def test_gradients_are_those_of_the_whole(make: Callable[[], list[nn.Module]], halves: bool) -> None:
    torch.manual_seed(0)
    blocks = make()
    modes = [BlockMode((True,) * len([*b.modules()]), (True,) * len([*b.parameters()])) for b in blocks]
    spec = CallSpec((), (Template((None,), {}, 0),), (0,) * len(blocks), tuple(modes), Ambient(True, False, ()))
    stage, entered = Stage(1, dict(enumerate(blocks)), torch.device("cpu")), torch.randn(2, 3, 4)
    found = []
    for index, each in enumerate(entered):
        (output,) = stage.forward(index, Call(spec, (), 0), (each,), HOP, HOP)
        found += (stage.backward_input if halves else stage.backward)(index, (output.cos(),))
        if halves:
            stage.backward_weight(index)
    gradients = [parameter.grad for parameter in stage.parameters()]
    leaf = entered.clone().requires_grad_()
    outputs = [nn.Sequential(*blocks)(each) for each in leaf]
    assert uses_again(outputs[0], leaf) is (make is not apart)
    expected = torch.autograd.grad(sum(output.sin().sum() for output in outputs), [leaf, *stage.parameters()])
    torch.testing.assert_close([torch.stack(found), *gradients], list(expected))
