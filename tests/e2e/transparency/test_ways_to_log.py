"""What a step logs is that of one process, whichever way it takes to ``self.log``, and so is what it reads of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.models import TanhBlock as Block
from tests.e2e.support import Run, assert_same_run, train

BATCH, NUM = 8, 28


def data() -> DataLoader[Any]:
    """Batches of 8, the last one of 4."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(NUM, 4, generator=generator), torch.randint(0, 3, (NUM,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.seen: list[Any] = []

    def logits(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Any:
        loss = functional.cross_entropy(self.logits(batch[0]), batch[1])
        return self.report(loss, batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.training_step(batch, index)

    def report(self, loss: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Loss(nn.Module):
    """Logs its parts by a function that it was given."""

    def __init__(self, log: Callable[..., None]) -> None:
        super().__init__()
        self.log = log

    def forward(self, loss: Tensor, batch: Any) -> Tensor:
        self.log("ce", loss, on_step=True, on_epoch=True)
        self.log("count", len(batch[0]), reduce_fx="sum", on_step=True, on_epoch=True)
        return loss


class EveryWay(Model):
    """All but an override."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "loss", Loss(self.log))
        self.on_bar = partial(self.log, prog_bar=True, on_epoch=True)
        self.all = partial(self.log_dict, on_epoch=True)

    def report(self, loss: Tensor, batch: Any) -> Tensor:
        self.loss(loss, batch)  # type: ignore[operator]
        if "late" not in vars(self):
            self.late = self.log
        self.late("late", loss, on_epoch=True)
        self.on_bar("mean", loss)
        self.all({"a": 2 * loss, "b": loss.item()})
        LightningModule.log(self, "direct", loss, False, None, False, True)
        self.log("near", 3 * loss, True, None, True, True, "mean", False, False, None, True, len(batch[0]))
        total = loss.detach().clone()
        self.log("total", total, on_epoch=True)
        total += 1  # it goes on counting in what it has logged
        return loss


class Overridden(Model):
    """What it makes of names and values is that of the moment."""

    prefix = ""

    def log(self, name: str, value: Any, stage: str = "s", **options: Any) -> None:  # type: ignore[override]
        super().log(f"{self.prefix}{stage}/{name}", value, **options)

    def report(self, loss: Tensor, batch: Any) -> Tensor:
        self.prefix = "a"
        self.log("ce", loss, on_epoch=True)
        self.prefix = "b"
        self.log("ce", 2 * loss, "t", on_epoch=True)
        self.prefix = ""
        super().log("plain", loss, on_epoch=True)
        return loss


class Reads(Model):
    """Weighs a term by what it has just logged."""

    metrics = "callback_metrics"

    def report(self, loss: Tensor, batch: Any) -> Tensor:
        self.log("train_loss" if self.training else "loss", loss)
        if not self.training:
            return loss
        value = getattr(self.trainer, self.metrics)["train_loss"]
        self.log("twice", 2 * value, prog_bar=True)
        return loss * (1 + float(value))


def both(make: Callable[[], Model], **options: Any) -> tuple[Run, Run]:
    strategy = {"num_microbatches": 4, "verbose": False, **options.pop("strategy", {})}
    options = {"max_steps": 6, "val_data": data(), "num_sanity_val_steps": 0, **options}
    return train(make, data(), 3, strategy, **options), train(make, data(), 1, **options)


def assert_same_logs(found: Run, plain: Run) -> None:
    assert_same_run(found, plain)
    expected = {name: float(value) for name, value in plain.trainer.callback_metrics.items()}
    assert expected
    assert {k: float(v) for k, v in found.trainer.callback_metrics.items()} == pytest.approx(expected, rel=1e-5)
    assert len(found.module.seen) == len(plain.module.seen)  # type: ignore[arg-type]
    for one, other in zip(found.module.seen, plain.module.seen, strict=True):  # type: ignore[arg-type]
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("make", [EveryWay, Overridden])
def test_every_way_is_logged_as_in_one_process(make: type[Model], caplog: pytest.LogCaptureFixture) -> None:
    assert_same_logs(*both(make))
    assert not [record for record in caplog.records if "runs once, on the whole batch" in record.getMessage()]


def test_what_a_step_has_logged_it_reads(caplog: pytest.LogCaptureFixture) -> None:
    assert_same_logs(*both(Reads))
    told = [text for record in caplog.records if "runs once, on the whole batch" in (text := record.getMessage())]
    assert ["reads what it has logged itself" in text for text in told] == [True]


def test_who_wants_such_a_batch_cut_reads_why_not() -> None:
    reads = type("Logged", (Reads,), {"metrics": "logged_metrics"})
    with pytest.raises(SkipPipeError, match=r"it reads what it has logged itself.*microbatches='stack'"):
        both(reads, strategy={"microbatches": "batch"})
