"""Blocks that look at other samples of the batch, or keep something from one forward to the next: they get it whole."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from skippipe_plugin.engine.errors import SkipPipeError
from tests.grids import all_slow_but, slow

from ..support import Run, assert_same_run, train
from .test_batch_statistics import Net, samples
from .test_whole import Visits


class Block(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], **buffers: Any) -> None:
        super().__init__()
        self.linear, self.function, self.count = nn.Linear(8, 8), function, 0
        self.drop = nn.Dropout(0.0)
        for name, value in buffers.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, h: Tensor) -> Tensor:
        return self.drop(h + torch.tanh(self.linear(self.function(self, h))))


class Started(nn.Module):
    """Its first batch decides on its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.linear = nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)
        self.register_buffer("is_set", torch.tensor(0))

    def forward(self, h: Tensor) -> Tensor:
        if self.training and not self.is_set:
            self.shift.data.copy_(-h.detach().mean(0))
            self.is_set.fill_(1)
        return torch.tanh(self.linear(h + self.shift))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 8, max_norm=0.5, scale_grad_by_freq=True)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.table((h[:, 0] > 0).long())


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] / (g[0].norm() + 1e-6)


def attend(_: Any, h: Tensor) -> Tensor:
    return (h @ h.T / 3).softmax(-1) @ h


def normalise(self: Any, h: Tensor) -> Tensor:
    if not self.training:
        return (h - self.mean) / 2
    with torch.no_grad():
        self.mean.lerp_(h.mean(0).mean(), 0.1)
    return h - h.mean(0)


def anneal(self: Any, h: Tensor) -> Tensor:
    if self.training:
        self.tau.mul_(0.9)
    return (h / self.tau).softmax(-1)


def count(self: Any, h: Tensor) -> Tensor:
    self.count += self.training
    return h * min(1.0, 0.5 + 0.1 * self.count)


def count_for_later(self: Any, h: Tensor) -> Tensor:
    self.count += self.training
    return h if self.count < 3 else 2 * h


MIXING: dict[str, Callable[[], nn.Module]] = {
    "attention between samples": partial(Block, attend),
    "deviation in the batch": partial(Block, lambda _, h: h * h.std(0, unbiased=False).mean()),
    "functional batch norm": partial(Block, lambda _, h: F.batch_norm(h, None, None, training=True)),
    "gradients normalised": partial(Block, lambda _, h: OneWay.apply(h)),
    "an embedding that counts": Counted,
}
KEEPING: dict[str, Callable[[], nn.Module]] = {
    "mean": partial(Block, normalise, mean=0.0),
    "tau": partial(Block, anneal, tau=1.0),
    "count": partial(Block, count),
    "count for later": partial(Block, count_for_later),
    "shift": Started,
    "_u": lambda: nn.Sequential(spectral_norm(nn.Linear(8, 8)), nn.Tanh()),
}
ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "linear": partial(Block, lambda _, h: h),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8)),
    "noise": partial(Block, lambda self, h: h + torch.randn_like(h) * self.training),
    "a layer that is dropped": partial(Block, lambda self, h: h * (torch.rand(len(h), 1, device=h.device) < 0.7)),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True), nn.Flatten(1)
    ),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Tanh()),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1)),
}
GETS_ALL = "runs once, on the whole batch"


def fit(block: Callable[[], nn.Module], devices: int, **settings: Any) -> tuple[Run, list[int]]:
    strategy = {"num_microbatches": 4, "verbose": False, **settings} if devices > 1 else None
    visits = Visits()
    run = train(
        partial(Net, block), samples(8), devices, strategy, val_data=samples(8), max_steps=3, callbacks=[visits]
    )
    return run, visits.counts


@pytest.mark.parametrize("name", [*MIXING, *KEEPING])
@pytest.mark.parametrize("microbatches", ["auto", slow("stack")])
def test_they_get_the_whole_batch(name: str, microbatches: str, caplog: pytest.LogCaptureFixture) -> None:
    block = (MIXING | KEEPING)[name]
    plain, _ = fit(block, 1)
    with caplog.at_level(logging.WARNING):
        piped, visits = fit(block, 3, microbatches=microbatches)
    assert visits == [1, 1, 1]
    assert_same_run(piped, plain)
    torch.testing.assert_close(piped.trainer.callback_metrics["val"], plain.trainer.callback_metrics["val"])
    said = "keeps something from one forward" if name in KEEPING else "computes something else for a part of the batch"
    assert f"a block (blocks.0) {said}" in caplog.text
    assert (GETS_ALL in caplog.text) == (microbatches == "auto")


@pytest.mark.parametrize("name", ["attention between samples", "tau"])
def test_who_wants_the_batch_cut_reads_why_not(name: str) -> None:
    block = (MIXING | KEEPING)[name]
    with pytest.raises(SkipPipeError, match=r"a block \(blocks\.0\) .* microbatches='stack' or num_microbatches=1"):
        fit(block, 3, microbatches="batch")
    assert_same_run(fit(block, 3, num_microbatches=1)[0], fit(block, 1)[0])


@pytest.mark.parametrize(
    "name", all_slow_but(ORDINARY, "dropout", "a layer that is dropped", "attention", "batch norm")
)
def test_others_are_cut(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, visits = fit(ORDINARY[name], 3)
    assert visits == [4, 4, 4]
    assert GETS_ALL not in caplog.text


def test_a_stage_of_the_drivers_is_asked_too() -> None:
    block = KEEPING["tau"]
    assert_same_run(fit(block, 3, driver_stage=True)[0], fit(block, 1)[0])
