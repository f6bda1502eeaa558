"""Which gradients are computed in float16, and that they overflow there as torch's do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skippipe_plugin.engine.half import computed_in_half, let_overflow


class Net(nn.Module):
    """Uses weights in all kinds of ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.matrix, self.table = nn.Parameter(torch.randn(4, 6)), nn.Embedding(6, 4)
        self.double = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x)) @ self.matrix[:, :4].T.float()
        return y @ self.table.weight.T @ torch.ones(6, 1) + self.table(torch.tensor([0]))


HALF = {"linear.weight", "linear.bias", "table.weight"}
RUNS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "plain": lambda net, x: net(x),
    "checkpointed": lambda net, x: checkpoint(net, x, use_reentrant=False),
}


def names(net: Net, found: set[int]) -> set[str]:
    return {name for name, parameter in net.named_parameters() if id(parameter) in found}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("cache", [True, False])
def test_weights_that_autocast_casts_are_found(run: str, cache: bool) -> None:
    net, x = Net(), torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.float16, cache_enabled=cache):
        output = RUNS[run](net, x)
    assert names(net, computed_in_half([output.float().sum()])) - {"matrix"} == HALF
    with torch.autocast("cpu", torch.bfloat16):
        assert not computed_in_half([net(x)])
    assert not computed_in_half([net(x), x])


def test_a_transposed_weight_is_found() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    with torch.autocast("cpu", torch.float16):
        assert computed_in_half([torch.randn(2, 4) @ weight.view(4, 4).T]) == {id(weight)}


@pytest.mark.parametrize("scale", [1.0, 65503.9, 65519.0, 65520.0, 1e9, float("nan")])
def test_what_is_infinite_in_float16_becomes_so(scale: float) -> None:
    gradient = torch.tensor([scale, -scale, 0.0, 1e-9])
    expected = torch.where(gradient.half().isinf(), gradient.half().float(), gradient)
    let_overflow([gradient])
    assert torch.equal(gradient.nan_to_num(7.0, posinf=1e30), expected.nan_to_num(7.0, posinf=1e30))
