"""Gradients that a step computes by itself, and an encoder of torch's that leaves padding empty in evaluation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin import SkipPipeError
from tests.e2e.models import TanhBlock as Block
from tests.e2e.support import assert_same_run, train

from lightning.pytorch import LightningModule  # isort: skip
from tests.grids import slow


class Model(LightningModule):
    def __init__(self, term: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.term = term

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        self.features = hidden
        return self.head(hidden)

    def training_step(self, batch: Any, index: int) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        out = self(inputs)
        return F.mse_loss(out, batch[1]) + self.term(self, inputs, out)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def data() -> DataLoader[Any]:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs.pow(2).sum(1, keepdim=True)), batch_size=8)


def of_the_inputs(model: Model, inputs: Tensor, out: Tensor) -> Any:
    (slope,) = torch.autograd.grad(out.sum(), inputs, create_graph=True, allow_unused=True)
    return 0.0 if slope is None else slope.pow(2).mean()


def of_the_embedding(model: Model, inputs: Tensor, out: Tensor) -> Any:
    found = torch.autograd.grad(
        out.sum(), [model.head.weight, model.embed.weight], create_graph=True, allow_unused=True
    )
    return sum(each.pow(2).mean() for each in found if each is not None)


def backward_inside(model: Model, inputs: Tensor, out: Tensor) -> Any:
    (out * 2).mean().backward(retain_graph=True)
    return 0.0


def of_the_head(model: Model, inputs: Tensor, out: Tensor) -> Any:
    (slope,) = torch.autograd.grad(out.mean(), model.features, create_graph=True)
    return slope.pow(2).sum()


def before_the_blocks(model: Model, inputs: Tensor, out: Tensor) -> Any:
    (slope,) = torch.autograd.grad(model.embed(inputs).sum(), inputs, create_graph=True)
    return slope.pow(2).mean()


@pytest.mark.parametrize("microbatches", ["auto", "stack"])
@pytest.mark.parametrize(
    ("term", "text"),
    [
        (of_the_inputs, "something before them"),
        (of_the_embedding, "before them"),
        (backward_inside, "inside of the step"),
    ],
)
def test_what_ends_at_the_blocks_is_refused(term: Any, text: str, microbatches: str) -> None:
    with pytest.raises(SkipPipeError, match=text):
        train(lambda: Model(term), data(), 3, {"num_microbatches": 4, "microbatches": microbatches})


class Twice(Model):
    """Computes the term of its first or of its second call when it has made both."""

    def __init__(self, term: Any, call: int) -> None:
        super().__init__(term)
        self.call = call

    def training_step(self, batch: Any, index: int) -> Tensor:
        inputs = batch[0].clone().requires_grad_()
        outs = self(inputs), self(0.9 * inputs)
        return F.mse_loss(sum(outs), batch[1]) + self.term(self, inputs, outs[self.call])


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("term", [of_the_inputs, of_the_embedding, backward_inside])
def test_so_it_is_in_the_first_batch_of_a_step_with_two_calls(term: Any, call: int) -> None:
    with pytest.raises(SkipPipeError, match="inside of the step"):
        train(lambda: Twice(term, call), data(), 3, {"num_microbatches": 4, "microbatches": "stack"})


@pytest.mark.parametrize("microbatches", ["auto", "stack"])
@pytest.mark.parametrize("term", [of_the_head, before_the_blocks])
def test_what_does_not_pass_the_blocks_is_exact(term: Any, microbatches: str) -> None:
    settings = {"num_microbatches": 4, "microbatches": microbatches}
    assert_same_run(train(lambda: Model(term), data(), 3, settings), train(lambda: Model(term), data(), 1))


class Encoder(LightningModule):
    def __init__(self, norm: bool, left: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(8) if norm else None)
        self.embed, self.head, self.left = nn.Linear(4, 8), nn.Linear(8, 1), left

    def forward(self, inputs: Tensor) -> Tensor:
        padded = torch.zeros(len(inputs), 5, dtype=torch.bool, device=inputs.device)
        padded[:, 3:] = True
        if not self.left:
            padded = padded.flip(1)
        hidden = self.embed(inputs)[:, None].repeat(1, 5, 1)
        return self.head(self.encoder(hidden, src_key_padding_mask=padded)).sum(1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("value", self(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


@pytest.mark.parametrize("norm", [slow(False), True])
@pytest.mark.parametrize("left", [False, True])
def test_an_encoder_leaves_padding_empty_in_evaluation(norm: bool, left: bool) -> None:
    settings = {"num_microbatches": 4}
    found, plain = (
        train(lambda: Encoder(norm, left), data(), devices, each, val_data=data())
        for devices, each in ((3, settings), (1, None))
    )
    assert_same_run(found, plain)
    assert float(found.trainer.callback_metrics["value"]) == pytest.approx(
        float(plain.trainer.callback_metrics["value"])
    )
    assert "forward" not in found.module.encoder.__dict__
