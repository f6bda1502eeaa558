"""Batches that are not one tensor: exactly as in one process, or refused with a way out that is."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

from skippipe_plugin.driver.capture.batches import BatchError
from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.support import assert_same_run, train
from tests.grids import all_slow_but, slow

PIPELINE = {"num_microbatches": 4, "verbose": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Reads(LightningModule):
    """Makes tensors of its batch by ``read``."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def loss(self, batch: Any) -> Tensor:
        x, y = (each.to(self.device) for each in self.read(batch))
        return F.mse_loss(self(x).squeeze(-1), y)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", self.loss(batch), batch_size=len(self.read(batch)[1]))

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.05)


class Samples(Dataset[Any]):
    def __init__(self, num: int = 21) -> None:
        self.x = torch.randn(num, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.x[index].sum()


@dataclass
class Sample:
    x: Tensor
    y: float


class Boxed:
    """A batch class of the user's."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def stacked(rows: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


def columns(rows: list[Any], **more: Any) -> dict[str, Any]:
    x, y = stacked(rows)
    return {"x": x, "y": y, **more}


def both(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def unpacked(batch: Any) -> tuple[Tensor, Tensor]:
    return pad_packed_sequence(batch[0], batch_first=True)[0].squeeze(-1), batch[1]


Form = tuple[Callable[[list[Any]], Any], Callable[[Any], tuple[Tensor, Tensor]]]
EXACT: dict[str, Form] = {
    "pairs": (list, stacked),
    "sequences": (lambda rows: [x for x, _ in rows], lambda b: (torch.stack(b), torch.stack(b).sum(1))),
    "dicts": (
        lambda rows: [{"x": x, "y": y} for x, y in rows],
        lambda b: (torch.stack([each["x"] for each in b]), torch.stack([each["y"] for each in b])),
    ),
    "dataclasses": (
        lambda rows: [Sample(x, float(y)) for x, y in rows],
        lambda b: (torch.stack([each.x for each in b]), torch.tensor([each.y for each in b])),
    ),
    "zipped": (lambda rows: tuple(zip(*rows, strict=True)), lambda b: (torch.stack(b[0]), torch.stack(b[1]))),
    "any_length": (
        lambda rows: ([x[: 4 + i % 3] for i, (x, _) in enumerate(rows)], torch.stack([y for _, y in rows])),
        lambda b: (torch.stack([F.pad(x, (0, 8 - len(x))) for x in b[0]]), b[1]),
    ),
    "detection": (
        lambda rows: (
            [x for x, _ in rows],
            [{"y": y, "boxes": torch.zeros(2 + i % 3, 4)} for i, (_, y) in enumerate(rows)],
        ),
        lambda b: (torch.stack(b[0]), torch.stack([each["y"] for each in b[1]])),
    ),
    "numpy": (
        lambda rows: {"x": stacked(rows)[0], "y": stacked(rows)[1].numpy()},
        lambda b: (b["x"], torch.from_numpy(b["y"])),
    ),
    "namespace": (lambda rows: SimpleNamespace(**columns(rows)), lambda b: (b.x, b.y)),
    "strings": (
        lambda rows: [str(x.tolist()) for x, _ in rows],
        lambda b: (torch.tensor([eval(each) for each in b]), torch.tensor([sum(eval(each)) for each in b])),
    ),
}
UNCUT: dict[str, tuple[Form, str]] = {
    "class_weights": (
        (lambda rows: columns(rows, weight=torch.ones(3)), lambda b: (b["x"], b["y"] * b["weight"].mean())),
        r"batch\['weight'\]: 3",
    ),
    "numpy_class_weights": (
        (lambda rows: columns(rows, weight=np.ones(3, np.float32)), lambda b: (b["x"], b["y"] * float(b["weight"][0]))),
        r"batch\['weight'\]: 3",
    ),
    "batch_class": (
        (lambda rows: {"boxed": Boxed(stacked(rows)[0]), "y": stacked(rows)[1]}, lambda b: (b["boxed"].x, b["y"])),
        r"batch\['boxed'\] is a Boxed",
    ),
    "sparse": (
        (lambda rows: (stacked(rows)[0].to_sparse(), stacked(rows)[1]), lambda b: (b[0].to_dense(), b[1])),
        r"batch\[0\] is a sparse coo tensor",
    ),
    "packed": (
        (lambda rows: (pack_sequence([x[:, None] for x, _ in rows]), stacked(rows)[1]), unpacked),
        r"batch\[0\] is a PackedSequence",
    ),
    "time_first": (
        (lambda rows: (stacked(rows)[0].T.contiguous(), stacked(rows)[1]), lambda b: (b[0].T, b[1])),
        "",
    ),
}


def run(form: Form, devices: int, **settings: Any) -> Any:
    collate, read = form
    data, val = (DataLoader(Samples(), batch_size=9, collate_fn=collate) for _ in range(2))
    strategy = PIPELINE | settings if devices > 1 else None
    return train(partial(Reads, read), data, devices, strategy, max_steps=6, val_data=val)


@pytest.mark.parametrize("form", all_slow_but(EXACT, "dataclasses", "detection", "strings"))
def test_a_batch_with_one_entry_for_each_sample_is_cut(form: str) -> None:
    found, expected = run(EXACT[form], 3), run(EXACT[form], 1)
    assert_same_run(found, expected)
    metrics = found.trainer.callback_metrics, expected.trainer.callback_metrics
    torch.testing.assert_close(metrics[0]["val"], metrics[1]["val"])


@pytest.mark.parametrize("settings", [{"driver_stage": True}, {"schedule": "gpipe", "num_microbatches": 3}])
@pytest.mark.parametrize("form", [slow("pairs"), "detection"])
def test_it_is_cut_alike_in_other_pipelines(form: str, settings: dict[str, Any]) -> None:
    assert_same_run(run(EXACT[form], 3, **settings), run(EXACT[form], 1))


@pytest.mark.parametrize("form", UNCUT)
def test_what_cannot_be_cut_runs_once_and_says_so(form: str, caplog: pytest.LogCaptureFixture) -> None:
    form_, message = UNCUT[form]
    with caplog.at_level(logging.WARNING):
        found = run(form_, 3)
    assert_same_run(found, run(form_, 1))
    said = [each.message for each in caplog.records if "runs once, on the whole batch" in each.message]
    assert len(said) == 1
    assert re.search(message, said[0])


@pytest.mark.parametrize("form", all_slow_but(UNCUT, "numpy_class_weights", "batch_class", "sparse", "packed"))
def test_who_wants_it_cut_reads_why_not_and_ways_out_that_are_exact(form: str) -> None:
    form_, message = UNCUT[form]
    with pytest.raises(BatchError, match=f"{message}(.|\n)*microbatches='stack' or num_microbatches=1") as caught:
        run(form_, 3, microbatches="batch")
    assert isinstance(caught.value, SkipPipeError)
    expected = run(form_, 1)
    for settings in ({"num_microbatches": 1}, {"microbatches": "stack"}):
        assert_same_run(run(form_, 3, **settings), expected)


@pytest.mark.parametrize("cell", [iter, map], ids=["iterator", "map"])
def test_what_a_batch_is_read_from_is_read_once(cell: Any) -> None:
    def collate(rows: list[Any]) -> Any:
        x, y = stacked(rows)
        return x, iter(list(y)) if cell is iter else map(torch.neg, list(y))

    def fit(devices: int) -> Any:
        data = DataLoader(Samples(), batch_size=9, collate_fn=collate)
        make = partial(Reads, lambda batch: (batch[0], torch.stack(list(batch[1]))))
        return train(make, data, devices, PIPELINE if devices > 1 else None, max_steps=6)

    assert_same_run(fit(3), fit(1))


class Evaluates(Reads):
    """Only its evaluation gets what cannot be cut."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]).squeeze(-1), batch[1])


@pytest.mark.parametrize("form", UNCUT)
def test_evaluation_takes_what_cannot_be_cut(form: str) -> None:
    collate, read = UNCUT[form][0]
    data = DataLoader(Samples(18), batch_size=9)
    val = DataLoader(Samples(), batch_size=9, collate_fn=collate)
    found, expected = (
        train(partial(Evaluates, read), data, devices, settings, max_steps=2, val_data=val)
        for devices, settings in ((3, PIPELINE), (1, None))
    )
    assert_same_run(found, expected)
    torch.testing.assert_close(found.trainer.callback_metrics["val"], expected.trainer.callback_metrics["val"])


class Longest(Reads):
    """Pads to the longest sample of what it is called with."""

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, lengths = batch
        mask = torch.arange(int(lengths.max()), device=self.device)[None] < lengths[:, None]
        return (self(x) * mask[:, :, None]).mean()


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(self.norm(h))


class NormedBlocks(Reads):
    def __init__(self) -> None:
        super().__init__(stacked)
        self.blocks = nn.ModuleList(Normed() for _ in range(4))


class NormedHead(Reads):
    def __init__(self) -> None:
        super().__init__(stacked)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 1))


def padded() -> DataLoader[Any]:
    lengths = torch.tensor([3, 3, 10, 4, 5, 6, 3, 4])
    x = torch.randn(8, 10, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(list(zip(x, lengths, strict=True)), batch_size=8)


LACKING: dict[str, tuple[Callable[[], LightningModule], Callable[[], Any], str]] = {
    "longest_sample": (lambda: Longest(both), padded, "must match the size"),
    "batch_norm": (
        NormedHead,
        lambda: DataLoader(Samples(4), batch_size=4, collate_fn=list),
        "Expected more than 1 value per channel",
    ),
    "batch_norm_in_a_block": (
        NormedBlocks,
        lambda: DataLoader(Samples(4), batch_size=4, collate_fn=list),
        "on which a BatchNorm inside of the blocks",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_an_error_says_that_a_microbatch_may_lack_what_the_batch_has(name: str) -> None:
    make, data, message = LACKING[name]
    with pytest.raises((RuntimeError, ValueError), match=message) as caught:
        train(make, data(), 3, {**PIPELINE, "microbatches": "batch"}, max_steps=2)
    if name != "batch_norm_in_a_block":
        assert "a microbatch fails where the batch does not" in str(caught.value)
        assert "microbatches='stack'" in str(caught.value)
    expected, alone = (
        train(make, data(), devices, settings, max_epochs=3, max_steps=3)
        for devices, settings in ((1, None), (3, {"num_microbatches": 1, "verbose": False}))
    )
    assert_same_run(alone, expected)
    if name != "batch_norm_in_a_block":  # by itself the step runs on whole batches then
        assert_same_run(train(make, data(), 3, PIPELINE, max_epochs=3, max_steps=3), expected)
