"""Gradients that a step or a hook reads are those that one process shows there, or refused."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.models import TanhBlock as Block
from tests.e2e.support import assert_same_run, train

PIPELINE = {"num_microbatches": 4, "verbose": False}


def batches() -> DataLoader[Any]:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.pow(2).sum(1, keepdim=True)), batch_size=8)


def norm_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(-1.0)


class Model(LightningModule):
    """Its loss depends on the gradients of what is around the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.seen: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        before = self.before()
        hidden = self.embed(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        loss = nn.functional.mse_loss(self.head(hidden), batch[1])
        after = norm_of(self.head.parameters())
        self.log_dict({"before": before, "after": after})
        return loss * (1.5 + torch.tanh(before) + torch.tanh(after))

    def before(self) -> Tensor:
        return norm_of(self.embed.parameters())

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append(float(norm_of(self.parameters())))

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(float(norm_of(self.parameters())))
        self.seen += [float(self.trainer.callback_metrics[name]) for name in ("before", "after")]

    def on_before_zero_grad(self, _: Any) -> None:
        self.seen.append(float(norm_of([*self.embed.parameters(), *self.head.parameters()])))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.002)


class OfBlocksInTheStep(Model):
    def before(self) -> Tensor:
        return norm_of(self.parameters())


class OfBlocksBeforeZeroing(Model):
    def on_before_zero_grad(self, _: Any) -> None:
        self.seen.append(float(norm_of(self.parameters())))


class DropsThem(Model):
    """Zeroes by itself what it has read."""

    def before(self) -> Tensor:
        found = norm_of(self.embed.parameters())
        for parameter in self.embed.parameters():
            parameter.grad = None
        return found


@pytest.mark.parametrize("accumulated", [1, 2])
def test_gradients_around_the_blocks_are_there_in_the_step(accumulated: int, caplog: pytest.LogCaptureFixture) -> None:
    fit = {"max_steps": 4, "accumulate_grad_batches": accumulated}
    found, plain = train(Model, batches(), 3, PIPELINE, **fit), train(Model, batches(), 1, **fit)
    assert_same_run(found, plain)
    assert len(plain.module.seen) > 8  # type: ignore[arg-type]
    assert found.module.seen == pytest.approx(plain.module.seen, rel=1e-4)
    told = [text for record in caplog.records if "runs once, on the whole batch" in (text := record.getMessage())]
    assert ["reads the gradients of parameters" in text for text in told] == [True]


def test_what_a_step_writes_there_counts() -> None:
    fit = {"max_steps": 2, "accumulate_grad_batches": 2}
    found, plain = train(DropsThem, batches(), 3, PIPELINE, **fit), train(DropsThem, batches(), 1, **fit)
    assert_same_run(found, plain)


@pytest.mark.parametrize("make", [OfBlocksInTheStep, OfBlocksBeforeZeroing])
def test_those_of_blocks_are_refused_there(make: type[Model]) -> None:
    with pytest.raises(SkipPipeError, match=r"dropped when the next training step begins.*on_train_batch_end"):
        train(make, batches(), 3, PIPELINE, max_steps=3)


def test_who_wants_such_a_batch_cut_reads_why_not() -> None:
    with pytest.raises(SkipPipeError, match=r"it reads the gradients of parameters.*microbatches='stack'"):
        train(Model, batches(), 3, {**PIPELINE, "microbatches": "batch"}, max_steps=2)
