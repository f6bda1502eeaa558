"""Optimizers of torch and of others: each steps the blocks on the workers as in one process, or is refused by name."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from skippipe_plugin.accelerate import SkipPipe, SkipPipeConfig
from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e import optimizers as own
from tests.e2e.modules import loader
from tests.e2e.support import Run, assert_same_run, train
from tests.grids import all_slow_but, slow

DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
STEPS = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


class Model(LightningModule):
    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functools.reduce(lambda h, block: block(h), self.blocks, self.embed(x)))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return F.mse_loss(self(batch), batch.pow(2).sum(1, keepdim=True))

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val_loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> Any:
        return self.make(self)


Make = Callable[[LightningModule], Any]


def fit(make: Make, devices: int, *, model: Callable[[Make], LightningModule] = Model, **options: Any) -> Run:
    strategy = {"num_microbatches": 4, "verbose": False} if devices > 1 else None
    return train(lambda: model(make), loader(DATA), devices, strategy, **{"max_steps": STEPS, **options})


def assert_exact(make: Make, model: Callable[[Make], LightningModule] = Model, **options: Any) -> tuple[Run, Run]:
    expected = fit(make, 1, model=model, **copy.deepcopy(options))
    found = fit(make, 3, model=model, **options)
    assert_same_run(found, expected)
    assert_same_state(found.trainer.optimizers[0], expected.trainer.optimizers[0])
    return found, expected


def assert_same_state(found: Optimizer, expected: Optimizer) -> None:
    """The whole of a checkpoint's part: every entry of every parameter, and the groups."""
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert list(found_state["state"]) == list(expected_state["state"])
    for number, entries in expected_state["state"].items():
        for name, value in entries.items():
            entry = torch.as_tensor(found_state["state"][number][name])
            torch.testing.assert_close(entry.cpu(), torch.as_tensor(value).cpu(), rtol=1e-4, atol=1e-4)
    assert repr(found_state["param_groups"]) == repr(expected_state["param_groups"])


def groups(module: LightningModule) -> list[dict[str, Any]]:
    """Three groups: both sides, the blocks only, the driver only."""
    named = list(module.named_parameters())
    weights = [p for name, p in named if name.endswith("weight")]
    biases = [p for name, p in named if name.endswith("bias") and "blocks" in name]
    rest = [p for name, p in named if name.endswith("bias") and "blocks" not in name]
    return [{"params": weights}, {"params": biases, "lr": 0.01, "note": "own"}, {"params": rest, "lr": 0.005}]


TORCH = {
    "SGD": lambda p: optim.SGD(p, 0.01, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, 0.01, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda p: optim.Adam(p, 0.02, eps=1e-4, betas=(0.8, 0.95)),
    "AdamW": lambda p: optim.AdamW(p, 0.02, eps=1e-4, amsgrad=True, foreach=False),
    "fused": lambda p: optim.AdamW(p, 0.02, eps=1e-4, fused=True),
    "tensor lr": lambda p: optim.AdamW(p, torch.tensor(0.02), eps=1e-4, foreach=False),
    "maximize": lambda p: optim.AdamW(p, 1e-3, eps=1e-4, maximize=True),
    "Adamax": lambda p: optim.Adamax(p, 0.02, eps=1e-4),
    "NAdam": lambda p: optim.NAdam(p, 0.02, eps=1e-4, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, 0.02, eps=1e-4),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, eps=1e-4, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, 0.001),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05, initial_accumulator_value=0.1, lr_decay=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, 0.5, eps=1e-3),
    "ASGD": lambda p: optim.ASGD(p, 0.01, t0=2, lambd=0.01),
    "Adafactor": lambda p: optim.Adafactor(p, 0.02),
}


@pytest.mark.parametrize("name", all_slow_but(TORCH, "AdamW", "fused", "tensor lr", "Rprop", "ASGD", "Adafactor"))
def test_the_optimizers_of_torch_are_exact(name: str) -> None:
    assert_exact(lambda module: TORCH[name](module.parameters()))


@pytest.mark.parametrize("name", [slow("SGD"), "AdamW", slow("NAdam"), slow("ASGD"), "Adafactor"])
def test_groups_of_either_side_only(name: str) -> None:
    found, _ = assert_exact(lambda module: TORCH[name](groups(module)))
    assert found.trainer.optimizers[0].param_groups[1]["note"] == "own"


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_muon_on_the_matrices_of_the_blocks() -> None:
    assert_exact(lambda module: optim.Muon([p for p in module.parameters() if p.dim() == 2], lr=0.02))


OWN: dict[str, Make] = {
    "count as a number": lambda m: own.Counting(m.parameters()),
    "count as a tensor": lambda m: own.Counting(m.parameters(), tensor=True),
    "count from the constructor": lambda m: own.Counting(m.parameters(), late=False),
    "count by group": lambda m: own.Counting(groups(m)),
    "count on itself": lambda m: own.CountingItself(m.parameters(), power=0.7),
    "function on itself": lambda m: own.CountingItself(m.parameters(), power=0.1, rule=own.halved),
    "local function on itself": lambda m: own.CountingItself(m.parameters(), rule=lambda rate: rate / 3),
    "state from the constructor": lambda m: own.Anchored(m.parameters()),
    "trust ratios": lambda m: own.Trusting(m.parameters()),
    "looking ahead": lambda m: own.LookingAhead(groups(m)),
}


@pytest.mark.parametrize(
    "name",
    all_slow_but(OWN, "count by group", "local function on itself", "looking ahead"),
)
def test_optimizers_of_others_that_step_each_parameter_by_itself_are_exact(name: str) -> None:
    if name == "state from the constructor":  # made on the driver it would have no values: accelerate's side has them
        pytest.skip("see test_state_that_a_constructor_made_under_accelerate")
    assert_exact(OWN[name])


@pytest.mark.parametrize("accumulate", [slow(1), 2])
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_change_the_rate_between_steps(tensor: bool, accumulate: int) -> None:
    def make(module: LightningModule) -> dict[str, Any]:
        optimizer = own.Counting(groups(module), tensor=tensor)
        schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))  # starts with 0
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    assert_exact(make, accumulate_grad_batches=accumulate)


class Editing(Model):
    """Edits the groups in the hooks of a step."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        optimizer.param_groups[0]["lr"] *= 0.7

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        optimizer.param_groups[0]["weight_decay"] = 0.1 * batch_idx
        optimizer.param_groups[0]["betas"] = (0.5 + 0.05 * batch_idx, 0.99)


def test_what_hooks_change_in_the_groups_counts_at_once() -> None:
    assert_exact(lambda m: TORCH["AdamW"](m.parameters()), model=Editing)


class Regrouping(Model):
    """Moves a parameter of a block into another group, adds one, and takes one out."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups = self.trainer.optimizers[0].param_groups
        if batch_idx == 0:
            groups[1]["params"].append(groups[0]["params"].pop(2))
        if batch_idx == 1:
            self.trainer.optimizers[0].add_param_group({"params": [self.blocks[3].linear.bias], "lr": 0.05})
        if batch_idx == 2:
            groups[0]["params"].pop(3)


def test_parameters_change_groups() -> None:
    def make(module: LightningModule) -> Optimizer:
        left_out = module.blocks[3].linear.bias
        named = [p for p in module.parameters() if p is not left_out]
        return optim.SGD([{"params": named[:8]}, {"params": named[8:], "lr": 0.01}], lr=0.02, momentum=0.9)

    expected = fit(make, 1, model=Regrouping)
    assert_same_run(fit(make, 3, model=Regrouping), expected)


class Freezing(Model):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for parameter in (*self.blocks[1].parameters(), self.embed.weight):
            parameter.requires_grad_(batch_idx not in (1, 2))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_parameters_are_frozen_for_a_while(name: str) -> None:
    assert_exact(lambda module: TORCH[name](module.parameters()), model=Freezing)


def test_a_norm_is_of_what_the_optimizer_steps() -> None:
    def make(module: LightningModule) -> Optimizer:
        return optim.SGD([p for name, p in module.named_parameters() if "norm" not in name], lr=0.5)

    assert_exact(make, gradient_clip_val=0.1)


class Swapping(Model):
    """What the documentation of schedule-free optimizers says to do."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.seen: list[float] = []

    def on_train_epoch_start(self) -> None:
        self.trainer.optimizers[0].train()

    def on_validation_start(self) -> None:
        self.trainer.optimizers[0].eval()

    def on_validation_end(self) -> None:
        self.seen.append(float(self.trainer.callback_metrics["val_loss"]))
        self.trainer.optimizers[0].train()

    def on_train_end(self) -> None:
        self.trainer.optimizers[0].eval()


def test_schedule_free_optimizers_change_weights_everywhere() -> None:
    def make(module: LightningModule) -> Optimizer:
        return own.ScheduleFree(groups(module))

    options = {"val_data": loader(DATA[:8]), "val_check_interval": 2, "num_sanity_val_steps": 0}
    found, expected = assert_exact(make, model=Swapping, **options)
    assert len(expected.module.seen) == 2
    assert found.module.seen == pytest.approx(expected.module.seen, rel=1e-5)


@pytest.mark.parametrize("name", [slow("AdamW"), "NAdam", slow("count as a tensor"), "looking ahead"])
def test_a_checkpoint_is_that_of_one_process_and_resumes_either_way(name: str, tmp_path: Path) -> None:
    make = OWN.get(name) or (lambda module: TORCH[name](module.parameters()))

    def half(devices: int, folder: str) -> str:
        keep = ModelCheckpoint(tmp_path / folder, "half", every_n_train_steps=3)
        fit(make, devices, callbacks=[keep], enable_checkpointing=True, max_steps=3)
        return str(tmp_path / folder / "half.ckpt")

    plain, ours = half(1, "plain"), half(3, "ours")
    states = [torch.load(path, "cpu", weights_only=False)["optimizer_states"][0] for path in (plain, ours)]
    torch.testing.assert_close(states[1]["state"], states[0]["state"], rtol=1e-4, atol=1e-5)
    assert repr(states[1]["param_groups"]) == repr(states[0]["param_groups"])
    expected = fit(make, 1, ckpt_path=plain)
    for path in (plain, ours):
        assert_same_run(fit(make, 3, ckpt_path=path), expected)
    assert_same_run(fit(make, 1, ckpt_path=ours), expected)


# ------------------------------------------------------------- the hooks of a step


class SkippingSteps(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class SteppingTwice(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        optimizer.step()


class WarmingUp(Model):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.002 * (batch_idx + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class NeverZeroing(Model):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None: ...


class ZeroingSometimes(Model):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


class Filling(Freezing):
    """Zeros in place of nothing: what is frozen goes on with its momentum and decay."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


class ZeroingByHand(Model):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        for parameter in self.parameters():
            parameter.grad = None


class ZeroingTheModule(Model):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        self.zero_grad()


class DroppingABatch(Model):
    """Leaves out the gradients of a batch that is no good."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2:
            self.zero_grad()


class DroppingABatchByTheOptimizer(Model):
    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2:
            self.trainer.optimizers[0].zero_grad()


@pytest.mark.parametrize("accumulate", [slow(1), 2])
@pytest.mark.parametrize("name", [pytest.param("SGD", marks=pytest.mark.slow), "AdamW"])
@pytest.mark.parametrize(
    "model",
    [
        slow(SkippingSteps),
        SteppingTwice,
        WarmingUp,
        NeverZeroing,
        slow(ZeroingSometimes),
        slow(Filling),
        ZeroingByHand,
        slow(ZeroingTheModule),
        DroppingABatch,
        slow(DroppingABatchByTheOptimizer),
    ],
    ids=lambda model: model.__name__,
)
def test_overridden_hooks_of_a_step_are_exact(model: type[Model], name: str, accumulate: int) -> None:
    make = lambda module: TORCH[name](module.parameters())  # noqa: E731
    options = {"accumulate_grad_batches": accumulate, "max_steps": -1, "max_epochs": 2}
    expected = fit(make, 1, model=model, **options)
    assert_same_run(fit(make, 3, model=model, **options), expected)


class SteppingOnceMore(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.optimizers[0].step()


class BackwardTwice(Model):
    def backward(self, loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()


class BackwardOfTwice(Model):
    """What the error says to do."""

    def backward(self, loss: Tensor) -> None:
        (2 * loss).backward()


def test_a_second_step_for_the_same_gradients_says_what_to_override() -> None:
    make = lambda module: TORCH["SGD"](module.parameters())  # noqa: E731
    with pytest.raises(SkipPipeError, match=r"optimizer\.step\(\) was called twice .* override optimizer_step in the"):
        fit(make, 3, callbacks=[SteppingOnceMore()])
    expected = fit(make, 1, model=WarmingUp, callbacks=[SteppingOnceMore()])
    assert_same_run(fit(make, 3, model=WarmingUp, callbacks=[SteppingOnceMore()]), expected)


def test_a_second_backward_says_what_to_do() -> None:
    make = lambda module: TORCH["SGD"](module.parameters())  # noqa: E731
    with pytest.raises(SkipPipeError, match="backward was called twice for the loss of one batch"):
        fit(make, 3, model=BackwardTwice)
    assert_same_run(fit(make, 3, model=BackwardOfTwice), fit(make, 1, model=BackwardTwice))


# ------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Make, str]] = {
    "norm of all": (lambda m: own.GlobalNorm(m.parameters()), "GlobalNorm steps a parameter otherwise .* all param"),
    "norm of a group": (lambda m: own.ClippingLate(m.parameters()), "ClippingLate steps a parameter otherwise"),
    "one rate": (lambda m: own.OneRate(groups(m)), "OneRate steps a parameter otherwise"),
    "noise": (lambda m: own.Noisy(m.parameters()), "Noisy steps .* or draws random numbers"),
    "LBFGS": (lambda m: optim.LBFGS(m.parameters()), r"LBFGS\.step needs a closure"),
    "sharpness": (lambda m: own.Sharp(m.parameters(), 0.02), r"Sharp\.step\(\) fails without a closure"),
    "closure twice": (lambda m: own.TwiceIfAsked(m.parameters(), 0.02), "called its closure 2 times"),
    "wrapper": (lambda m: own.Wrapping(optim.SGD(m.parameters(), 0.02)), "Wrapping cannot be built on a worker"),
    "argument": (lambda m: own.NeedsMore(m.parameters(), 7), "NeedsMore cannot be built .* no argument beyond them"),
    "zero_grad": (lambda m: own.NeverZero(m.parameters()), "NeverZero overrides zero_grad"),
    "counts gradients": (lambda m: own.CountingGradients(groups(m)), "counts in parameter group 1 only where"),
    "module on itself": (
        lambda m: own.HoldingModule(m.parameters(), nn.Linear(1, 1)),
        "keeps 'net' on itself, a Linear",
    ),
    "sparse": (lambda m: optim.SparseAdam(list(m.parameters())), "SparseAdam.*dense gradients"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_optimizers_are_refused_when_fit_starts(name: str) -> None:
    make, message = REFUSED[name]
    started: list[int] = []

    class Note(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            started.append(1)

    with pytest.raises(SkipPipeError, match=message):
        fit(make, 3, callbacks=[Note()])
    assert not started


def test_the_ways_out_are_exact() -> None:
    """A group with a parameter of the driver's in it; an optimizer that looks at one parameter at a time."""
    assert_exact(lambda m: own.CountingGradients([groups(m)[0], {"params": [*groups(m)[1]["params"], m.head.bias]}]))
    assert_exact(OWN["trust ratios"])


def test_a_group_that_holds_a_parameter_is_refused() -> None:
    def make(module: LightningModule) -> Optimizer:
        return optim.SGD([{"params": list(module.parameters()), "like": module.blocks[0].linear.weight}], lr=0.1)

    with pytest.raises(SkipPipeError, match=r"group 0 of the SGD holds a parameter .* under 'like'"):
        fit(make, 3)


def test_a_step_that_was_replaced_on_the_object_is_refused() -> None:
    def make(module: LightningModule) -> Optimizer:
        optimizer = optim.SGD(module.parameters(), lr=0.1)
        optimizer.step = lambda closure=None: closure()  # type: ignore[method-assign]
        return optimizer

    with pytest.raises(SkipPipeError, match="the step of this SGD was replaced on the object"):
        fit(make, 3)


READS: dict[str, Callable[[Optimizer, Tensor], Any]] = {
    "item": lambda optimizer, p: optimizer.state[p]["exp_avg"],
    "get": lambda optimizer, p: optimizer.state.get(p),
    "in": lambda optimizer, p: p in optimizer.state,
    "write": lambda optimizer, p: optimizer.state.__setitem__(p, {}),
    "values": lambda optimizer, p: [state["step"] for state in optimizer.state.values()],
    "items": lambda optimizer, p: dict(optimizer.state.items()),
    "keys": lambda optimizer, p: list(optimizer.state),
    "copy": lambda optimizer, p: copy.deepcopy(optimizer),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("hook", [slow("on_before_optimizer_step"), "on_train_batch_end"])
def test_state_of_parameters_on_workers_is_not_read_as_nothing(read: str, hook: str) -> None:
    def look(self: Model, *_: Any) -> None:
        READS[read](self.trainer.optimizers[0], self.blocks[0].linear.weight)

    model = type("Looking", (Model,), {hook: look})
    with pytest.raises(SkipPipeError, match=r"is kept by a worker.* optimizer\.state_dict\(\) returns all of it"):
        fit(lambda m: TORCH["AdamW"](m.parameters()), 3, model=model)


class Reading(Model):
    """Reads what is here, and all by ``state_dict``; halves a moment by ``load_state_dict``."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.read: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        self.read.append(float(optimizer.state[self.head.weight]["exp_avg"].sum()))
        state = optimizer.state_dict()
        self.read += [float(each["exp_avg"].norm()) for each in state["state"].values()]
        if batch_idx == 2:
            for each in state["state"].values():
                each["exp_avg"] = each["exp_avg"] / 2
            optimizer.load_state_dict(state)


def test_state_dict_and_load_state_dict_are_the_way_out() -> None:
    found, expected = assert_exact(lambda m: TORCH["AdamW"](m.parameters()), model=Reading)
    assert found.module.read == pytest.approx(expected.module.read, rel=1e-4, abs=1e-6)


# ----------------------------------------------------------------- accelerate


def loop(make: Callable[[nn.Module], Optimizer], spread: bool, zero: str = "after", steps: int = STEPS) -> list[Any]:
    """A loop of accelerate; returns its losses and the weights."""
    torch.manual_seed(0)
    model, accelerator = Model(lambda _: None), Accelerator(cpu=True)
    plain = nn.Module.__call__
    optimizer = make(model)
    if callable(train_mode := getattr(optimizer, "train", None)):
        train_mode()
    pipe = SkipPipe(accelerator, None, SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False))
    losses: list[float] = []
    if spread:
        pipe.open()
    try:
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(steps):
            batch = DATA[8 * step : 8 * step + 8]
            if zero == "before":
                optimizer.zero_grad()
            loss = F.mse_loss(plain(model, batch), batch.pow(2).sum(1, keepdim=True))
            accelerator.backward(loss)
            optimizer.step()
            losses.append(float(loss))
            if zero == "after":
                optimizer.zero_grad()
            elif zero == "model":
                model.zero_grad()
            elif zero == "by hand":
                for parameter in model.parameters():
                    parameter.grad = None
            elif zero == "fill":
                optimizer.zero_grad(set_to_none=False)
            elif zero == "every second" and step % 2:
                optimizer.zero_grad()
            elif zero == "step twice":
                optimizer.step()
                optimizer.zero_grad()
    finally:
        if spread:
            pipe.close()
    return [losses, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}]


ZEROING = ["before", "after", "model", "by hand", "fill", "every second", "never", "step twice"]


@pytest.mark.parametrize("zero", ZEROING)
@pytest.mark.parametrize("name", [slow("SGD"), "AdamW"])
def test_a_loop_zeroes_gradients_when_it_likes(name: str, zero: str) -> None:
    make = lambda model: TORCH[name](model.parameters())  # noqa: E731
    torch.testing.assert_close(loop(make, True, zero), loop(make, False, zero), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", all_slow_but(OWN, "count as a tensor", "count by group", "state from the constructor", "looking ahead")
)
def test_optimizers_of_others_under_accelerate(name: str) -> None:
    torch.testing.assert_close(loop(OWN[name], True), loop(OWN[name], False), rtol=1e-4, atol=1e-5)


def test_optimizers_are_refused_under_accelerate_too() -> None:
    for name in ("norm of all", "LBFGS", "sharpness", "wrapper"):
        make, message = REFUSED[name]
        with pytest.raises(SkipPipeError, match=message):
            loop(make, True)
