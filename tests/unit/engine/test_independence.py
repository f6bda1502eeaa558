"""Blocks that compute the same for a part of a batch, and those that do not, or keep something between forwards."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skippipe_plugin.engine.call import Ambient, Call, CallSpec
from skippipe_plugin.engine.independence import FAILS, MIXES, Parts, difference

CALL = Call(CallSpec((), (), (), (), Ambient(True, False, ())), (), 0)


class Of(nn.Module):
    """A block of one function, with buffers and a counter."""

    def __init__(self, function: Callable[..., Tensor], **buffers: Tensor) -> None:
        super().__init__()
        self.function, self.calls, self.weight = function, 0, nn.Parameter(torch.ones(4))
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


class Picky(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        assert len(h) == 8
        return h


class Moved(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.transpose(0, 1) * 2


class PerBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] / g[0].norm()


def counted(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h


def settled(self: Any, h: Tensor) -> Tensor:
    self.calls = 3
    self.table = torch.arange(5)
    return h


def annealed(self: Any, h: Tensor) -> Tensor:
    self.tau.mul_(0.9)
    return h / self.tau


def summed(self: Any, h: Tensor) -> Tensor:
    self.total += h.detach().sum(0)
    self.number += len(h)
    return h


def averaged(self: Any, h: Tensor) -> Tensor:
    self.mean = self.mean.lerp(h.detach().mean(0), 0.1)
    return h


def gathered(self: Any, h: Tensor) -> Tensor:
    self.seen = torch.cat([self.seen, h.detach()])
    return h


def started(self: Any, h: Tensor) -> Tensor:
    if not self.is_set:
        self.weight.data.copy_(h.std(0))
        self.is_set.fill_(1)
    return h * self.weight


def unlucky(self: Any, h: Tensor) -> Tensor:
    return h * random.random()


def noisy(self: Any, h: Tensor) -> Tensor:
    drop = torch.rand(len(h), 1) < 0.5
    return F.dropout(h, 0.5) + torch.randn_like(h) + drop * F.scaled_dot_product_attention(h, h.detach(), h)[0]


ALONE = {
    "linear": lambda: nn.Linear(4, 4),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
    "batch norm that evaluates": lambda: nn.BatchNorm1d(4).eval(),
    "encoder": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True)),
    "gru": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), First(nn.GRU(2, 2, 2, dropout=0.5, batch_first=True))),
    "sums": lambda: Of(summed, total=torch.zeros(4), number=torch.tensor(0)),
    "the same each time": lambda: Of(settled),
    "numbers of Python's": lambda: Of(unlucky),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
}
MIXING = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm with dropout": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)),
    "mean": lambda: Of(lambda _, h: h + h.mean(0, keepdim=True)),
    "mean in evaluation": lambda: Of(lambda _, h: h + h.mean(0, keepdim=True)).eval(),
    "mean with dropout": lambda: Of(lambda _, h: F.dropout(h) + h.mean(0, keepdim=True)),
    "functional batch norm with dropout": lambda: Of(
        lambda _, h: F.dropout(F.batch_norm(h, None, None, training=True))
    ),
    "of one size": Picky,
    "gradients": lambda: Of(lambda _, h: PerBatch.apply(h * _.weight)),
    "counted in the gradient": lambda: Looked(scale_grad_by_freq=True),
}
KEEPING = {
    "calls": lambda: Of(counted),
    "tau": lambda: Of(annealed, tau=torch.tensor(1.0)),
    "mean": lambda: Of(averaged, mean=torch.zeros(4)),
    "weight": lambda: Of(started, is_set=torch.tensor(0)),
    "parametrizations.weight.0._u": lambda: nn.utils.parametrizations.spectral_norm(
        nn.Linear(4, 4), n_power_iterations=1
    ),
    "running_mean": lambda: Normed(),
}


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h)[0]


class Looked(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4, **options)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.embedding((h[:, 0] > 0).long())


class Normed(nn.InstanceNorm1d):
    def __init__(self) -> None:
        super().__init__(4, track_running_stats=True)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.unsqueeze(2).expand(-1, -1, 3) * torch.arange(1, 4)).mean(2)


def found(module: nn.Module, sizes: tuple[int, ...] = (5, 3), **options: Any) -> str:
    torch.manual_seed(1)
    modes = [each.training for each in module.modules()]
    state = copy.deepcopy(module.state_dict())
    parts = Parts((CALL,) * len(sizes), sizes, 0, 0, **options)
    with torch.no_grad():
        what = difference(module, lambda _, h: [module(h.clone())], CALL, torch.randn(sum(sizes), 4), parts)
    assert [each.training for each in module.modules()] == modes
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    return what


@pytest.mark.parametrize("name", ALONE)
def test_samples_stand_alone(name: str) -> None:
    assert found(ALONE[name]()) == ""


@pytest.mark.parametrize("name", MIXING)
def test_samples_are_mixed(name: str) -> None:
    assert found(MIXING[name]()) == MIXES


@pytest.mark.parametrize("name", KEEPING)
def test_something_is_kept(name: str) -> None:
    assert found(KEEPING[name]()) == name
    assert not found(KEEPING[name]().eval()) or name in ("calls", "tau", "mean", "weight")  # these do not ask


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}])
def test_batch_norm_can_be_left_out(options: dict[str, Any]) -> None:
    assert found(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, **options)), known_aside=True) == ""
    mixing = nn.Sequential(nn.BatchNorm1d(4, **options), Of(lambda _, h: h - h.mean(0)))
    assert found(mixing, known_aside=True) == MIXES


def test_one_that_fails() -> None:
    assert found(Picky(), (2, 2)) == FAILS


def test_a_dimension_that_moves() -> None:
    hidden = torch.randn(8, 4, 3)
    for leaves, expected in ((1, ""), (0, MIXES)):
        parts = Parts((CALL, CALL), (5, 3), 0, leaves)
        assert difference(Moved(), lambda _, h: [Moved()(h)], CALL, hidden, parts) == expected
