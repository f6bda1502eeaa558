"""What a step changes around the call of its blocks, and brings back behind it: microbatches take turns in between.

Each of several microbatches at the blocks has found what the one before it has changed, and brings that back.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError

from ..support import assert_same_run, train

Step = Callable[[Any, Tensor], Tensor]
"""What the module gives for a batch, in a step."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h)) * self.scale


class Averaged(LightningModule):
    """Trains and validates by ways of its own; keeps an average of its weights, and notes what it is like."""

    def __init__(self, training: Step, validation: Step) -> None:
        super().__init__()
        self.ways = {"training": training, "validation": validation}
        self.embed, self.head, self.other = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.depth = 0
        self.average = {name: value.detach().clone() for name, value in self.state_dict().items()}
        self.notes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self.ways["training"](self, batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("averaged", F.mse_loss(self.ways["validation"](self, batch[0]), batch[1]))
        self.log("own", F.mse_loss(self(batch[0]), batch[1]))

    def on_train_batch_end(self, *_: Any) -> None:
        for name, value in self.state_dict().items():
            self.average[name].lerp_(value, 0.5)
        self._note()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._note()

    def on_validation_epoch_end(self) -> None:
        self.notes += [float(self.trainer.callback_metrics[name]) for name in ("averaged", "own")]

    def _note(self) -> None:
        trained = [parameter.requires_grad for parameter in self.parameters()]
        self.notes += [self.depth, *trained, *(float(value.sum()) for value in self.state_dict().values())]
        self.notes += [float(value.sum()) for value in self.average.values()]

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.005, momentum=0.5)


def plainly(module: Averaged, x: Tensor) -> Tensor:
    return module(x)


def an_attribute(module: Averaged, x: Tensor) -> Tensor:
    before, module.depth = module.depth, module.depth + 1
    out = module(x)
    module.depth = before
    return out


def a_module(module: Averaged, x: Tensor) -> Tensor:
    before, module.head = module.head, module.other
    out = module(x)
    module.head = before
    return out


def a_flag(module: Averaged, x: Tensor) -> Tensor:
    before = module.head.bias.requires_grad
    module.head.bias.requires_grad_(not before)
    out = module(x)
    module.head.bias.requires_grad_(before)
    return out


def parameters_around_the_blocks(module: Averaged, x: Tensor) -> Tensor:
    return functional_call(module, {"head.weight": module.head.weight * 2, "embed.bias": module.embed.bias + 1}, (x,))


@contextlib.contextmanager
def averaged(module: Averaged) -> Iterator[None]:
    """As packages that average weights have it."""
    before = {name: value.clone() for name, value in module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.data.copy_(module.average[name])
    yield
    for name, parameter in module.named_parameters():
        parameter.data.copy_(before[name])


def weights(module: Averaged, x: Tensor) -> Tensor:
    with averaged(module):
        return module(x)


def weights_swapped(module: Averaged, x: Tensor) -> Tensor:
    for name, parameter in module.named_parameters():
        parameter.data, module.average[name] = module.average[name], parameter.data
    out = module(x)
    for name, parameter in module.named_parameters():
        parameter.data, module.average[name] = module.average[name], parameter.data
    return out


def weights_around_the_blocks(module: Averaged, x: Tensor) -> Tensor:
    """Those of the head alone, which are the average's in the sanity check still."""
    before, module.head.weight.data = module.head.weight.data, module.average["head.weight"]
    out = module(x)
    module.head.weight.data = before
    return out


def parameters_and_buffers_of_blocks(module: Averaged, x: Tensor) -> Tensor:
    return functional_call(module, module.average, (x,)) + functional_call(
        module, {"blocks.2.linear.bias": torch.ones(8, device=x.device)}, (x,)
    )


IN_TRAINING = [an_attribute, a_module, a_flag, parameters_around_the_blocks]
IN_VALIDATION = [
    *(*IN_TRAINING, weights_around_the_blocks),
    *(weights, weights_swapped, parameters_and_buffers_of_blocks),
]
WAYS = [*((way, plainly) for way in IN_TRAINING), *((plainly, way) for way in IN_VALIDATION)]
SETTINGS = [
    {},
    {"num_microbatches": 2, "schedule": "gpipe"},
    {"num_microbatches": 1},
    {"microbatches": "stack"},
    {"driver_stage": True},
]


def loader(count: int) -> DataLoader[Any]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def check(training: Step, validation: Step, settings: dict[str, Any]) -> None:
    make = partial(Averaged, training, validation)
    strategies = (None, {"num_microbatches": 4, "verbose": False, **settings})
    plain, found = (
        train(make, loader(24), 3 if each else 1, each, val_data=loader(16), max_epochs=2, max_steps=-1)
        for each in strategies
    )
    assert_same_run(found, plain)
    assert found.module.notes == pytest.approx(plain.module.notes, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("training", "validation"), [(a_module, weights), (plainly, parameters_and_buffers_of_blocks)])
def test_what_is_brought_back_is_that_of_one_process(training: Step, validation: Step) -> None:
    check(training, validation, {})


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("training", "validation"), WAYS, ids=lambda way: way.__name__)
def test_each_is_in_every_pipeline(training: Step, validation: Step, settings: dict[str, Any]) -> None:
    check(training, validation, settings)


@pytest.mark.parametrize("detached", [False, True])
def test_parameters_of_blocks_may_not_be_others_in_training(detached: bool) -> None:
    def others(module: Averaged, x: Tensor) -> Tensor:
        given = {name: value * 1.0 for name, value in module.named_parameters()}
        return functional_call(module, {n: v.detach() for n, v in given.items()} if detached else given, (x,))

    with pytest.raises(SkipPipeError, match=r"stands in the place of blocks\.0\..* Compute the weight inside"):
        train(partial(Averaged, others, plainly), loader(8), 3, {"num_microbatches": 2, "verbose": False}, max_steps=1)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("way", ["parametrized", "copied"])
def test_the_ways_out_are_exact(way: str) -> None:
    class Teaching(Averaged):
        def __init__(self) -> None:
            super().__init__(plainly, plainly)
            for block in self.blocks if way == "parametrized" else ():
                parametrize.register_parametrization(block.linear, "weight", Halved())
            self.average = {name: value.detach().clone() for name, value in self.state_dict().items()}

        def on_fit_start(self) -> None:
            parts = nn.ModuleDict({"embed": self.embed, "blocks": self.blocks, "head": self.head})
            self.teacher = [copy.deepcopy(parts)]

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            if way == "copied":
                (teacher,) = self.teacher
                with torch.no_grad():
                    h = teacher["embed"](batch[0])
                    for block in teacher["blocks"]:
                        h = block(h)
                loss = loss + F.mse_loss(self(batch[0]), teacher["head"](h).detach())
            return loss

    plain, found = (
        train(Teaching, loader(16), 3 if each else 1, each, max_steps=2)
        for each in (None, {"num_microbatches": 2, "verbose": False})
    )
    assert_same_run(found, plain)
