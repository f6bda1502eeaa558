"""A refusal that the step's own code catches is raised all the same: what it goes on with is not one process's."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from skippipe_plugin.driver.capture import greenlets
from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader, points
from tests.e2e.support import Run, assert_same_run, train

PIPELINE = {"num_microbatches": 4, "verbose": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Trying(LightningModule):
    """Calls ``between`` on the hidden states between two blocks, and goes on when that fails."""

    def __init__(self, between: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.between = between

    def training_step(self, batch: Any, _: int) -> Tensor:
        h = self.embed(batch["x"])
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index == 1:
                self.between(self, h)
        return F.cross_entropy(self.head(h), batch["y"])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def norm(_: Any, h: Tensor) -> None:
    with contextlib.suppress(Exception):
        h.norm().item()


def other(_: Any, h: Tensor) -> None:
    try:
        h.sum().item()
    except Exception as error:
        raise ValueError("the norm does not work") from error


KINDS = {
    "caught": (norm, "code between the blocks of a pipeline needs the output of blocks.1"),
    "raised as another": (other, "code between the blocks of a pipeline needs the output of blocks.1"),
}


def fit(between: Callable[[Any, Tensor], Any], devices: int) -> Run:
    return train(lambda: Trying(between), loader(points(24)), devices, PIPELINE if devices > 1 else None, max_steps=3)


@pytest.mark.parametrize("in_threads", [False, True], ids=["greenlets", "threads"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_cannot_be_swallowed(kind: str, in_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenlets, "AVAILABLE", not in_threads and greenlets.AVAILABLE)
    between, text = KINDS[kind]
    with pytest.raises(SkipPipeError, match=text):
        fit(between, 3)


def test_other_errors_are_the_users_to_catch() -> None:
    def own(_: Any, __: Tensor) -> None:
        with contextlib.suppress(KeyError):
            raise KeyError("mine")

    assert_same_run(fit(own, 3), fit(own, 1))


class WithAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + torch.tanh(self.linear(h))
        return h, h.pow(2).mean()


class Falling(Trying):
    """Sums up what blocks return beside their hidden states, and goes on with zeros when that fails."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)
        self.blocks = nn.ModuleList(WithAuxiliary() for _ in range(4))

    def training_step(self, batch: Any, _: int) -> Tensor:
        h, total = self.embed(batch["x"]), torch.zeros(())
        try:
            for block in self.blocks:
                h, auxiliary = block(h)
                total = total + auxiliary
        except Exception:
            h = torch.zeros_like(batch["x"])
        return F.cross_entropy(self.head(h), batch["y"]) + 0.1 * total


@pytest.mark.parametrize("count", [1, 4])
def test_what_asks_for_a_tensor_cannot_be_swallowed_either(count: int) -> None:
    def run(devices: int) -> Run:
        strategy = {**PIPELINE, "num_microbatches": count} if devices > 1 else None
        return train(Falling, loader(points(24)), devices, strategy, max_steps=3)

    assert_same_run(run(3), run(1))
