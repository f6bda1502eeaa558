"""BatchNorm inside of the blocks: exact where microbatches have one sample, else it sees microbatches, said once."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError
from tests.grids import all_slow_but, slow

from .. import loops
from ..support import Run, assert_same_run, train

NOTICE = "takes its statistics from microbatches of"


class Normed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8, **options)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.norm(self.linear(h)))


class Convolved(nn.Module):
    """Of a picture of one pixel, and of one with more."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.parts = nn.Sequential(nn.Conv2d(8 // size, 8 // size, 1), nn.BatchNorm2d(8 // size))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.parts(h.reshape(len(h), -1, 1, self.size))).flatten(1)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "of features": Normed,
    "without running statistics": partial(Normed, track_running_stats=False),
    "of one pixel": partial(Convolved, 1),
    "of two pixels": partial(Convolved, 2),
}


class Net(LightningModule):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.01)


def samples(batch_size: int, count: int = 24) -> DataLoader[Any]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)


def fit(kind: str, devices: int, data: DataLoader[Any], *, validate: bool = True, **settings: Any) -> Run:
    strategy = {"num_microbatches": 4, "verbose": False, **settings} if devices > 1 else None
    val = data if validate else None
    return train(partial(Net, BLOCKS[kind]), data, devices, strategy, val_data=val, max_steps=6)


@pytest.mark.parametrize("batch_size", [slow(3), 4, slow(5), slow(7)])
@pytest.mark.parametrize("kind", all_slow_but(BLOCKS, "of features", "without running statistics", "of one pixel"))
def test_with_microbatches_of_one_sample_it_has_the_batch(kind: str, batch_size: int) -> None:
    data = samples(batch_size, 6 * batch_size)
    piped, plain = fit(kind, 3, data), fit(kind, 1, data)
    assert_same_run(piped, plain)
    torch.testing.assert_close(piped.trainer.callback_metrics["val"], plain.trainer.callback_metrics["val"])


@pytest.mark.parametrize("kind", ["of features", "of one pixel"])
def test_so_it_has_where_the_driver_hosts_a_stage(kind: str) -> None:
    assert_same_run(fit(kind, 3, samples(5, 30), driver_stage=True), fit(kind, 1, samples(5, 30)))


def test_so_it_has_in_a_last_batch_that_is_smaller() -> None:
    """Nobody is asked any more then; that the batches before see microbatches is said once."""
    found = fit("of features", 3, samples(8, 21)).losses
    assert len(found) == 6
    assert all(loss == loss for loss in found)


def test_that_it_sees_microbatches_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit("of features", 3, samples(8))
    assert caplog.text.count(f"(blocks.0.norm) {NOTICE} 2 samples, as under gradient accumulation") == 1


@pytest.mark.parametrize("way_out", [{"microbatches": "stack"}, {"num_microbatches": 1}], ids=str)
def test_the_way_out_of_the_notice(way_out: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert_same_run(fit("of features", 3, samples(8), **way_out), fit("of features", 1, samples(8)))
    assert NOTICE not in caplog.text


@pytest.mark.parametrize("batch_size", [4, 5])
def test_who_wants_the_batch_cut_reads_why_not(batch_size: int) -> None:
    data = samples(batch_size, 20)
    with pytest.raises(
        SkipPipeError, match=r"some have one, on which a BatchNorm inside of the blocks \(blocks\.0\.norm\)"
    ):
        fit("of features", 3, data, microbatches="batch")
    stack = fit("of features", 3, data, microbatches="stack")
    assert_same_run(stack, fit("of features", 1, data))


def test_a_block_that_fails_while_it_is_asked_leaves_the_workers_usable() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, h: Tensor) -> Tensor:
            if len(h) < 3:
                raise ValueError("too few samples")
            return h + torch.tanh(self.linear(h))

    data = samples(8)
    plain, piped = (
        train(partial(Net, Picky), data, devices, strategy, max_steps=4)
        for devices, strategy in ((1, None), (3, {"num_microbatches": 4, "verbose": False}))
    )
    assert_same_run(piped, plain)


WHOLE = [{"num_microbatches": 4}, {"num_microbatches": 4, "microbatches": "stack"}, {"num_microbatches": 1}]


@pytest.mark.parametrize("settings", WHOLE, ids=str)
def test_loops_of_accelerate(settings: dict[str, Any]) -> None:
    """Its counts included: no step is given up after the blocks have run."""
    found = []
    for which in ("plain", "pipeline"):
        torch.manual_seed(0)
        with loops.accelerator(which, **(settings if which == "pipeline" else {})) as current:
            model: Any = Net(Normed)
            optimizer: Any = SGD(model.parameters(), lr=0.1)
            model, optimizer, data = current.prepare(model, optimizer, samples(5, 20))
            losses = []
            for x, y in data:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                current.backward(loss)
                optimizer.step()
                losses.append(loss.item())
            found.append((losses, {name: value.clone() for name, value in current.get_state_dict(model).items()}))
    torch.testing.assert_close(*found)
