"""Recurrent and reparametrized blocks that come to another worker in the middle of a run, or are made on meta."""

import signal
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim import SGD

from skippipe_plugin.callbacks import StageRecovery
from tests.grids import all_slow_but, slow

from ..modules import loader
from ..support import Run, assert_same_run, train
from ..test_recovery import At, Ready, kill

PIPELINE = {"num_microbatches": 4, "verbose": False}


class Recurrent(nn.Module):
    """A residual block of a kind of recurrence; its flat weights are views that a copy may break."""

    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(8), kind(8, 8, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.rnn(self.norm(h))[0]


class Normed(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.linear = wrap(nn.Linear(8, 8))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "gru": partial(Recurrent, nn.GRU),
    "lstm": partial(Recurrent, nn.LSTM),
    "rnn": partial(Recurrent, nn.RNN),
    "weight norm": partial(Normed, nn.utils.weight_norm),
    "parametrized": partial(Normed, parametrizations.weight_norm),
}


class Net(LightningModule):
    """Of sequences; with ``meta`` its blocks are made where they will be."""

    def __init__(self, block: Callable[[], nn.Module], meta: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        with torch.device("meta" if meta else "cpu"):
            self.blocks = nn.ModuleList(block() for _ in range(4))

    def training_step(self, batch: Any, _: int) -> Tensor:
        h = self.embed(batch)
        for block in self.blocks:
            h = block(h)
        return F.mse_loss(self.head(h.mean(1)), batch.sum((1, 2))[:, None])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(kind: str, *callbacks: Any, devices: int = 3, meta: bool = False, **settings: Any) -> Run:
    data = loader(torch.randn(40, 5, 4, generator=torch.Generator().manual_seed(1)), 8)
    strategy = {**PIPELINE, **settings} if devices > 1 else None
    return train(partial(Net, BLOCKS[kind], meta), data, devices, strategy, max_steps=5, callbacks=list(callbacks))


@pytest.mark.parametrize("kind", all_slow_but(BLOCKS, "gru"))
def test_a_stage_that_is_handed_over_trains_on_as_if_it_had_stayed(kind: str) -> None:
    recovery = StageRecovery()
    leave = At("on_train_batch_start", 3, kill(2, how=signal.SIGTERM))
    found = fit(kind, recovery, leave, Ready(recovery.policy.spares))
    assert [event.source for event in recovery.events] == ["relieved"]
    assert_same_run(found, fit(kind, devices=1))


@pytest.mark.parametrize("kind", all_slow_but(BLOCKS, "weight norm"))
def test_a_stage_that_is_lost_is_rebuilt_and_computes(kind: str) -> None:
    recovery = StageRecovery()
    found = fit(kind, recovery, At("on_train_batch_start", 3, kill(2)), Ready(recovery.policy.spares))
    assert len(recovery.events) == 1
    assert len(found.losses) == 5
    assert all(torch.isfinite(weight).all() for weight in found.weights.values())
    plain = fit(kind, devices=1)
    assert found.losses[:2] == pytest.approx(plain.losses[:2], rel=1e-5)
    batch = torch.randn(3, 5, 4)
    for one, other in zip(found.module.blocks, plain.module.blocks, strict=True):
        other.load_state_dict(one.state_dict())
        h = found.module.embed(batch)
        torch.testing.assert_close(one(h), other(h))  # no flat weight or view is stale


@pytest.mark.parametrize("kind", ["gru", slow("lstm")])
def test_blocks_that_are_made_on_meta_train(kind: str) -> None:
    found = fit(kind, meta=True)
    assert found.losses[-1] < 2 * found.losses[0]
    weights = [block.rnn.weight_hh_l0 for block in found.module.blocks]
    assert all(weight.abs().max() <= 0.4 and weight.std() > 0.1 for weight in weights)  # torch's own initialisation
    assert len({float(weight.std()) for weight in weights}) == 4
