"""What user code sets on the blocks after they went to their workers: exact, or refused with the attribute's name."""

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train
from tests.e2e.zoo import lora_gpt2
from tests.grids import all_slow_but, slow

DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Inner(nn.Module):
    """A part of a block with a setting of each sort."""

    def __init__(self, options: SimpleNamespace) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale, self.scaling, self.options, self.shift = 1.0, {"default": 1.0}, options, torch.zeros(8)
        self.steps = [1.0]

    def forward(self, hidden: Tensor) -> Tensor:
        scale = self.scale * self.scaling["default"] * self.options.scale * sum(self.steps)
        return torch.tanh(self.linear(hidden)) * scale + self.shift.to(hidden.device)


class Block(nn.Module):
    temperature = 1.0

    def __init__(self, options: SimpleNamespace) -> None:
        super().__init__()
        self.inner, self.norm, self.dropout = Inner(options), nn.LayerNorm(8), nn.Dropout(0.0)
        self.condition: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.dropout(self.inner(self.norm(hidden))) * self.temperature
        return hidden + out if self.condition is None else hidden + out + self.condition


class Model(LightningModule):
    """Blocks between an embedding and a head; ``change`` is what the user does with them."""

    def __init__(self, change: Callable[[Any, str, int], None] = lambda *_: None) -> None:
        super().__init__()
        options = SimpleNamespace(scale=1.0)
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block(options) for _ in range(4)])
        self.change, self.logged = change, []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for index, block in enumerate(self.blocks):
            self.x, self.index = x, index
            self.change(self, "call", index)
            hidden = block(hidden)
            self.change(self, "called", index)
        return self.head(hidden)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return F.mse_loss(self(batch), batch.pow(2).sum(1, keepdim=True))

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.change(self, "validation_step", index)
        self.log("val", F.mse_loss(self(batch), batch.sum(1, keepdim=True)))

    def on_validation_end(self) -> None:
        self.logged.append(float(self.trainer.callback_metrics["val"]))
        self.change(self, "on_validation_end", 0)

    def on_fit_start(self) -> None:
        self.change(self, "on_fit_start", 0)

    def on_train_epoch_start(self) -> None:
        self.change(self, "on_train_epoch_start", self.current_epoch)

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.change(self, "on_train_batch_start", index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.003)


def fit(
    change: Callable[[Any, str, int], None], devices: int, strategy: dict[str, Any] | None = None, **options: Any
) -> Any:
    pipe = {"num_microbatches": 4, "verbose": False, **(strategy or {})} if devices > 1 else None
    usual = {"max_steps": 6, "max_epochs": 2, "num_sanity_val_steps": 0, "val_data": loader(DATA)}
    return train(lambda: Model(change), loader(DATA), devices, pipe, **{**usual, **options})


def assert_exact(change: Callable[[Any, str, int], None], strategy: dict[str, Any] | None = None) -> None:
    """Compare with one process, and see that the change made a difference there."""
    plain, unchanged = fit(change, 1), fit(lambda *_: None, 1)
    assert plain.losses != unchanged.losses or plain.module.logged != unchanged.module.logged
    piped = fit(change, 3, strategy)
    assert_same_run(piped, plain)
    assert piped.module.logged == pytest.approx(plain.module.logged, rel=1e-5)


# ------------------------------------------------------------------- exact


def scheduled_temperature(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        for block in model.blocks:
            block.temperature = 1.0 / (1 + index)


def setting_of_a_submodule(model: Model, where: str, index: int) -> None:
    if where == "on_train_epoch_start":
        model.blocks[2].inner.scale = 2.0 + index


def item_of_a_dictionary(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        model.blocks[1].inner.scaling["default"] = 1.5 + index


def key_of_a_dictionary(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        model.blocks[1].inner.scaling = {"other": 1.0, "default": 3.0}


def list_grows(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        model.blocks[3].inner.steps.append(0.5)


def shared_options(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        model.blocks[0].inner.options.scale = 0.5 * (1 + index)


def tensor_is_replaced(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        model.blocks[1].inner.shift = torch.full((8,), 0.1 * index)


def tensor_is_written_to(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        model.blocks[1].inner.shift += 0.1


def own_value_for_each_microbatch(model: Model, where: str, index: int) -> None:
    if where == "call" and index == 0:
        for block in model.blocks:
            block.condition = model.x.mean(1, keepdim=True)


def set_and_reset_around_each_call(model: Model, where: str, index: int) -> None:
    if where == "call":
        model.blocks[index].condition = model.x.mean(1, keepdim=True) * index
    elif where == "called":
        model.blocks[index].condition = None


def in_validation_only(model: Model, where: str, index: int) -> None:
    if where == "validation_step":
        model.blocks[2].temperature = 0.25
    elif where == "on_validation_end":
        model.blocks[2].temperature = 1.0


def in_validation_only_and_deleted(model: Model, where: str, index: int) -> None:
    if where == "validation_step":
        model.blocks[2].temperature = 0.25
    elif where == "on_validation_end" and "temperature" in vars(model.blocks[2]):
        del model.blocks[2].temperature


def once_on_fit_start(model: Model, where: str, index: int) -> None:
    if where == "on_fit_start":
        model.blocks[3].condition = torch.ones(8, device=model.device)


def dropout_off_is_scheduled(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start":
        for block in model.blocks:
            block.dropout.p = 1.0 if index == 1 else 0.0


def layer_is_frozen_with_an_attribute(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start" and index == 1:
        model.blocks[1].requires_grad_(False)
        model.blocks[1].inner.scale = 3.0


EXACT = [
    scheduled_temperature,
    setting_of_a_submodule,
    item_of_a_dictionary,
    key_of_a_dictionary,
    list_grows,
    shared_options,
    tensor_is_replaced,
    tensor_is_written_to,
    own_value_for_each_microbatch,
    set_and_reset_around_each_call,
    in_validation_only,
    in_validation_only_and_deleted,
    once_on_fit_start,
    dropout_off_is_scheduled,
    layer_is_frozen_with_an_attribute,
]


@pytest.mark.parametrize(
    "change",
    all_slow_but(
        EXACT,
        setting_of_a_submodule,
        key_of_a_dictionary,
        tensor_is_written_to,
        set_and_reset_around_each_call,
        in_validation_only_and_deleted,
        layer_is_frozen_with_an_attribute,
    ),
    ids=lambda change: change.__name__,
)
def test_an_attribute_that_user_code_sets_is_that_of_one_process(change: Callable[[Any, str, int], None]) -> None:
    assert_exact(change)


@pytest.mark.parametrize(
    "change",
    [slow(scheduled_temperature), slow(setting_of_a_submodule), set_and_reset_around_each_call, item_of_a_dictionary],
)
def test_so_it_is_on_the_drivers_own_stage(change: Callable[[Any, str, int], None]) -> None:
    assert_exact(change, {"driver_stage": True})


def adapters_off_in_validation(model: Any, where: str) -> None:
    if where == "validation":
        model.logged.append("off")
        with model.net.disable_adapter():
            model.log("val", model.loss())


def other_adapter_for_each_batch(model: Any, where: str) -> None:
    if where == "batch":
        model.net.set_adapter("default" if model.global_step % 2 else "other")


def scaled_adapters(model: Any, where: str) -> None:
    if where == "batch":
        for module in model.net.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = 1.0 + model.global_step


class Adapted(LightningModule):
    """GPT-2 with two sets of adapters."""

    def __init__(self, change: Callable[[Any, str], None]) -> None:
        super().__init__()
        self.net = lora_gpt2()
        self.net.add_adapter("other", self.net.peft_config["default"])
        self.change, self.logged = change, []
        for name, parameter in self.net.named_parameters():  # as they come, adapters change nothing
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)

    def loss(self) -> Tensor:
        return self.net(input_ids=self.ids, labels=self.ids).loss

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.ids = batch
        return self.loss()

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.change(self, "batch")

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.ids = batch
        self.change(self, "validation")

    def on_validation_end(self) -> None:
        if "val" in self.trainer.callback_metrics:
            self.logged.append(float(self.trainer.callback_metrics["val"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    "change", [slow(adapters_off_in_validation), other_adapter_for_each_batch, slow(scaled_adapters)]
)
def test_adapters_of_peft_are_switched_and_scaled(change: Callable[[Any, str], None]) -> None:
    ids = torch.randint(3, 32, (24, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_steps": 6, "num_sanity_val_steps": 0, "val_data": loader(ids)}
    plain, piped = (
        train(
            lambda: Adapted(change), loader(ids), devices, {"num_microbatches": 4} if devices > 1 else None, **options
        )
        for devices in (1, 3)
    )
    assert_same_run(piped, plain)
    floats = [[value for value in run.module.logged if value != "off"] for run in (piped, plain)]
    assert floats[0] == pytest.approx(floats[1], rel=1e-5)


class KilledBetween(Callback):
    """Sets an attribute, and ends a worker a step later."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Tensor, index: int) -> None:
        if trainer.global_step == 1:
            module.blocks[3].temperature = 0.5
            module.blocks[0].inner.scaling["default"] = 0.5
        if trainer.global_step == 3 and self.rank is not None:
            os.kill(trainer.strategy.worker_pids[self.rank], signal.SIGKILL)


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_replacement_of_a_lost_worker_hears_of_it(rank: int) -> None:
    options = {"max_steps": 6, "max_epochs": 2, "num_sanity_val_steps": 0}
    plain = fit(lambda *_: None, 1, callbacks=[KilledBetween(None)], **options)
    recovery = StageRecovery(rule="mean", spares=1)
    strategy = {"replicas": 2}
    piped = train(
        Model, loader(DATA), 5, {"num_microbatches": 4, "verbose": False, **strategy},
        callbacks=[KilledBetween(rank), recovery], **options,
    )  # fmt: skip
    assert_same_run(piped, plain)


# ----------------------------------------------------------------- refused


def carries_a_gradient(model: Model, where: str, index: int) -> None:
    if where == "call" and index == 0:
        model.blocks[2].condition = model.embed(model.x)


def gradient_inside_a_list(model: Model, where: str, index: int) -> None:
    if where == "call" and index == 0:
        model.blocks[2].inner.steps = [model.embed(model.x).mean()]


def submodule_is_replaced(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start" and index == 1:
        model.blocks[1].norm = nn.Identity()


def submodule_is_added(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start" and index == 1:
        model.blocks[1].inner.extra = nn.Linear(8, 8)


def method_is_replaced(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start" and index == 1:
        block = model.blocks[1]
        block.forward = lambda hidden: hidden + block.inner(hidden)


def cannot_be_pickled(model: Model, where: str, index: int) -> None:
    if where == "on_train_batch_start" and index == 1:
        model.blocks[1].condition = (value for value in ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (carries_a_gradient, "the attribute blocks.2.condition was set to a tensor that carries a gradient"),
        (gradient_inside_a_list, "the attribute blocks.2.inner.steps was set to a tensor that carries a gradient"),
        (submodule_is_replaced, r"blocks.1(\.norm)? was (replaced, added|added, replaced) or removed"),
        (submodule_is_added, r"blocks.1(\.inner.extra)? was (replaced, added|added, replaced) or removed"),
        (method_is_replaced, "the attribute blocks.1.forward was set to the function"),
        (cannot_be_pickled, "the attribute blocks.1.condition was set after the blocks went to their workers"),
    ],
)
def test_what_cannot_be_sent_is_refused(change: Callable[[Any, str, int], None], message: str) -> None:
    with pytest.raises(SkipPipeError, match=message):
        fit(change, 3)


def detached(model: Model, where: str, index: int) -> None:
    if where == "call" and index == 0:
        model.blocks[2].condition = model.embed(model.x).detach()


def test_a_detached_tensor_goes_along_as_the_refusal_says() -> None:
    assert_exact(detached)


class MethodInTheConstructor(Model):
    def __init__(self) -> None:
        super().__init__()
        block = self.blocks[1]
        block.forward = lambda hidden: hidden + block.inner(hidden)


def test_a_method_replaced_in_the_constructor_goes_along_as_the_refusal_says() -> None:
    runs = [
        train(MethodInTheConstructor, loader(DATA), devices, {"num_microbatches": 4} if devices > 1 else None)
        for devices in (1, 3)
    ]
    assert_same_run(runs[1], runs[0])


@pytest.mark.slow
def test_the_memory_of_a_schedule_has_an_end() -> None:
    """Each step's value is another spec; workers forget those that are not used any more."""

    class EveryStep(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Tensor, index: int) -> None:
            for block in module.blocks:
                block.temperature = 1.0 / (1 + trainer.global_step)

    options = {"max_steps": 300, "max_epochs": 100, "val_data": None, "callbacks": [EveryStep()]}
    plain, piped = fit(lambda *_: None, 1, **options), fit(lambda *_: None, 3, {"num_microbatches": 2}, **options)
    assert_same_run(piped, plain)
