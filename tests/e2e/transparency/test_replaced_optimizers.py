"""``trainer.strategy.optimizers``, replaced during training: the workers' parts go with the new optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim

from skippipe_plugin import SkipPipeError
from tests.e2e.models import TanhBlock as Block
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train
from tests.grids import slow

DATA = loader(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), 8)


def anew(module: Any) -> None:
    if module.current_epoch == 1:
        module.trainer.strategy.optimizers = [optim.AdamW(module.parameters(), lr=0.01, eps=1e-4)]


def constructed(module: Any) -> None:
    if module.current_epoch == 1:
        module.trainer.optimizers = [optim.Adagrad(module.parameters(), 0.05, initial_accumulator_value=0.1)]


def and_back(module: Any) -> None:
    if module.current_epoch == 0:
        module.first = module.trainer.optimizers
    elif module.current_epoch == 1:
        anew(module)
    else:
        module.trainer.strategy.optimizers = module.first


class Model(LightningModule):
    def __init__(self, replace: Callable[[Any], None]) -> None:
        super().__init__()
        self.embed, self.head, self.replace = nn.Linear(4, 8), nn.Linear(8, 1), replace
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def training_step(self, batch: Tensor) -> Tensor:
        hidden = functools.reduce(lambda h, block: block(h), self.blocks, self.embed(batch))
        return F.mse_loss(self.head(hidden), batch.sum(1, keepdim=True))

    def on_train_epoch_start(self) -> None:
        self.replace(self)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(replace: Callable[[Any], None], devices: int, **options: Any) -> Any:
    strategy = {"num_microbatches": 4} if devices > 1 else None
    return train(lambda: Model(replace), DATA, devices, strategy, max_steps=8, **options)


@pytest.mark.parametrize("options", [slow({}), {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("replace", [anew, slow(constructed), and_back])
def test_another_optimizer_is_stepped_on_the_workers_too(replace: Callable[[Any], None], options: Any) -> None:
    found, expected = fit(replace, 3, **options), fit(replace, 1, **options)
    assert_same_run(found, expected)
    states = [each.trainer.optimizers[0].state_dict()["state"] for each in (found, expected)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def in_place(module: Any) -> None:
    module.trainer.strategy.optimizers[0] = optim.AdamW(module.parameters(), lr=0.01)


def two(module: Any) -> None:
    module.trainer.strategy.optimizers = [*module.trainer.optimizers, optim.AdamW(module.parameters(), lr=0.01)]


@pytest.mark.parametrize(("replace", "message"), [(in_place, "assign another list"), (two, "2 optimizers")])
def test_what_cannot_be_is_refused(replace: Callable[[Any], None], message: str) -> None:
    with pytest.raises(SkipPipeError, match=message):
        fit(replace, 3)
