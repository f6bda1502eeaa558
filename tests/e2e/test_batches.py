"""Batches of every form are cut into microbatches and moved as Lightning moves them."""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from tests.grids import all_slow_but

from .models import mlp
from .modules import BATCH
from .support import assert_same_run, train

STEPS = 5
Plain = namedtuple("Plain", ["x", "y"])


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    y: Tensor
    source: str = "record"


def _xy(index: int, size: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(index))
    return x, x.argmax(1) % 4


def _words(y: Tensor) -> list[str]:
    return [f"class {label}" for label in y.tolist()]


def _labels(words: list[str]) -> Tensor:
    return torch.tensor([int(word[-1]) for word in words])


def _both(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def _items(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0], batch[1]


def _attributes(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.x, batch.y


def _nested(batch: Any) -> tuple[Tensor, Tensor]:
    left, (right,) = batch["in"]
    return torch.cat([left, right], 1), batch["y"]


Form = tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]
FORMS: dict[str, Form] = {
    "tuple": (lambda x, y: (x, y), _items),
    "list": (lambda x, y: [x, y], _items),
    "dict": (lambda x, y: {"x": x, "y": y}, _both),
    "nested": (lambda x, y: {"in": [x[:, :4], (x[:, 4:],)], "y": y}, _nested),
    "dataclass": (Record, _attributes),
    "namedtuple": (Named, _attributes),
    "untyped_namedtuple": (Plain, _attributes),
    "batch_encoding": (lambda x, y: BatchEncoding({"x": x, "y": y}), _both),
    "strings": (lambda x, y: {"x": x, "text": _words(y)}, lambda batch: (batch["x"], _labels(batch["text"]))),
    "strings_in_a_tuple": (lambda x, y: (x, _words(y)), lambda batch: (batch[0], _labels(batch[1]))),
    "numbers": (lambda x, y: (x, y.tolist()), lambda batch: (batch[0], torch.tensor(batch[1]))),
    "scalars": (
        lambda x, y: {"x": x, "y": y, "scale": torch.tensor(1.0), "n": 3},
        lambda batch: (batch["x"] * batch["scale"], batch["y"]),
    ),
    "none": (lambda x, y: {"x": x, "mask": None, "y": y}, _both),
}


class Taking(LightningModule):
    """Reads its batch with ``read``."""

    def __init__(self, read: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.net = mlp()
        self.read = read

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.read(batch)
        assert len(x) == len(y)
        return torch.nn.functional.cross_entropy(self.net(x), y.to(self.device))

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.parameters(), lr=1e-2)


SIZES = [*((form, 5) for form in FORMS), ("tuple", BATCH), ("strings", 1)]
QUICK = [(form, 5) for form in ("list", "nested", "untyped_namedtuple", "batch_encoding", "strings_in_a_tuple", "none")]


@pytest.mark.parametrize(("form", "size"), all_slow_but(SIZES, *QUICK, ("strings", 1)))
def test_batches(form: str, size: int) -> None:
    build, read = FORMS[form]
    data = DataLoader(
        [build(*_xy(index, size)) for index in range(STEPS)], batch_size=None, collate_fn=lambda item: item
    )
    pipeline = train(lambda: Taking(read), data, 3, {"num_microbatches": 4}, max_steps=STEPS)
    assert_same_run(pipeline, train(lambda: Taking(read), data, 1, max_steps=STEPS))
