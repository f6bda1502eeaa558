"""Steps that do otherwise later than when they were asked, and steps that change their batch: one process's result.

Each runs as the batch needs it: in microbatches where its results follow from theirs, else once on the whole batch.
"""

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from skippipe_plugin.model.asking import Asking
from tests.e2e.models import TanhBlock as Block
from tests.e2e.support import assert_same_run, train
from tests.grids import all_slow_but, slow

GENERATOR = torch.Generator().manual_seed(0)
FEATURES, TARGETS = torch.randn(24, 4, generator=GENERATOR), torch.randint(0, 3, (24,), generator=GENERATOR)


class Samples(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return len(FEATURES)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": FEATURES[index], "labels": TARGETS[index], "name": f"sample {index}"}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    task = int(batch["name"][0].split()[1]) // 8
    return {**batch, "x": torch.stack(batch["x"]), "labels": torch.stack(batch["labels"]), "task": task}


def batches(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(Samples(), batch_size=batch_size, collate_fn=collate)


class Model(LightningModule):
    """Its loss gets a term over pairs of samples when :meth:`is_late` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.late = False
        self.settings = SimpleNamespace(late=False)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]

    def is_late(self, batch: dict[str, Any], batch_idx: int) -> bool:
        return False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        output = self(batch["x"])
        loss: Tensor = self.criterion(output, batch["labels"])
        if self.is_late(batch, batch_idx):
            loss = loss + (functional.normalize(output) @ functional.normalize(output).T).logsumexp(1).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def later(question: Callable[[Any, dict[str, Any], int], bool]) -> type[Model]:
    return type("Later", (Model,), {"is_late": question})


class Hooked(Model):
    """Changes something between epochs or batches."""

    def is_late(self, batch: dict[str, Any], batch_idx: int) -> bool:
        return self.late or self.settings.late


class Flag(Hooked):
    def on_train_epoch_start(self) -> None:
        self.late = self.current_epoch > 0


class FlagOfAnObject(Hooked):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.settings.late = self.global_step > 3


class Criterion(Model):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.criterion = nn.CrossEntropyLoss(reduction="sum")


class Reduction(Model):
    def on_train_epoch_start(self) -> None:
        self.criterion.reduction = "sum" if self.current_epoch else "mean"  # type: ignore[assignment]


class Weights(Model):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.criterion.weight = torch.tensor([0.1, 1.0, 4.0], device=self.device)


class Ignored(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.criterion.ignore_index = 1 if self.global_step > 3 else -100  # type: ignore[assignment]


LATER = {
    "epoch": later(lambda self, batch, index: self.current_epoch > 0),
    "step": later(lambda self, batch, index: self.trainer.global_step > 3),
    "number of the batch": later(lambda self, batch, index: index == 2),
    "last batch": later(lambda self, batch, index: self.trainer.is_last_batch),
    "number in the batch": later(lambda self, batch, index: batch["task"] == 2),
    "a metric": later(lambda self, batch, index: "val" in self.trainer.callback_metrics),
    "flag": Flag,
    "flag of an object": FlagOfAnObject,
    "criterion": Criterion,
    "reduction": Reduction,
    "class weights": Weights,
    "ignored label": Ignored,
}


class Validated(Model):
    """Validates, so that there are metrics and a sanity check."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = functional.cross_entropy(self(batch["x"]), batch["labels"])
        self.log("val", loss)
        if not self.trainer.sanity_checking:
            self.kept.append(loss.detach())


def both(make: Callable[[], LightningModule], **options: Any) -> tuple[Any, Any]:
    pipe = {"num_microbatches": 4, "verbose": False}
    usual = {"max_steps": -1, "max_epochs": 2, **options}
    return train(make, batches(), 3, pipe, **usual), train(make, batches(), 1, **usual)


@pytest.mark.parametrize(
    "kind",
    all_slow_but(
        LATER, "epoch", "last batch", "a metric", "flag of an object", "criterion", "class weights", "ignored label"
    ),
)
def test_what_a_step_does_later_is_one_processs(kind: str) -> None:
    own = LATER[kind]
    make = type("Kind", (own, Validated), {}) if kind == "a metric" else own
    assert_same_run(*both(make, val_data=batches() if kind == "a metric" else None))


class Follows(Model):
    """Weighs its loss by that of the step before, as logged."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        before = self.trainer.callback_metrics.get("loss", torch.tensor(1.0))
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * before)
        self.log("loss", loss)
        return loss


def test_a_step_by_a_number_that_always_moves_is_asked_a_few_times(
    told: Callable[[], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, ask = [], Asking._ask
    monkeypatch.setattr(Asking, "_ask", lambda *args: asked.append(1) or ask(*args))
    assert_same_run(*both(Follows, max_epochs=6))
    assert told()
    assert len(asked) < 15


def test_what_is_kept_after_the_sanity_check_is_one_processs() -> None:
    found, expected = both(Validated, val_data=batches(), num_sanity_val_steps=2)
    assert len(found.module.kept) == len(expected.module.kept) == 2 * 3
    torch.testing.assert_close(torch.stack(found.module.kept), torch.stack(expected.module.kept))


class Switch(Callback):
    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.late = trainer.current_epoch > 0  # type: ignore[assignment]


def test_a_callback_may_set_a_flag() -> None:
    assert_same_run(*both(Hooked, callbacks=[Switch()]))


# ------------------------------------------------------------------ the batch


class Popping(Model):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = batch.pop("labels")
        return functional.cross_entropy(self(batch["x"]), labels)

    validation_step = training_step  # type: ignore[assignment]


class Scaling(Model):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch["x"] = batch["x"] / 2 - 0.5
        return super().training_step(batch, batch_idx)


class ScalingInPlace(Model):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch["x"].div_(2).sub_(batch["x"].mean())
        return super().training_step(batch, batch_idx)


class Keeping(Model):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch["output"] = self(batch["x"])
        return functional.cross_entropy(batch["output"], batch["labels"])

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self.kept.append(batch["output"].detach())


class Sensitive(Model):
    """Reads the gradient of what it was given."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch["x"].requires_grad_()
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        self.kept.append(batch["x"].grad)


@pytest.mark.parametrize("make", [Popping, slow(Scaling), ScalingInPlace, slow(Keeping), Sensitive])
def test_a_step_may_change_its_batch(make: type[Model]) -> None:
    found, expected = both(make, val_data=batches() if make is Popping else None)
    assert_same_run(found, expected)
    for one, other in zip(found.module.kept, expected.module.kept, strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------ what stays as it was


class Passing(Model):
    """Passes on the number of its batch, logs, and counts in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.temperature = 0, 1.0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss * self.temperature

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1
        self.temperature *= 0.9


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], bool]]:
    """Whether it was said that a step runs on the whole batch."""
    with caplog.at_level(logging.WARNING):
        yield lambda: "runs once, on the whole batch" in caplog.text


def test_an_ordinary_step_still_runs_in_microbatches(told: Callable[[], bool]) -> None:
    assert_same_run(*both(Passing, max_epochs=4))
    assert not told()
    assert_same_run(*both(LATER["step"]))
    assert told()
