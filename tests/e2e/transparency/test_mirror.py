"""What user code reads of blocks on workers, and writes into them: as in one process, in every hook."""

import copy
import functools
import io
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.accelerate import SkipPipeAccelerator
from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import SkipPipeStrategy
from tests.e2e.support import trainer_for
from tests.grids import all_slow_but, slow

WIDTH = 8
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("gain", torch.ones(WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.gain * torch.tanh(self.linear(self.norm(hidden)))


class Gated(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.layer(hidden[:, None])
        return hidden + (output[0] if isinstance(output, tuple) else output)[:, 0]


class Model(LightningModule):
    """Four blocks between two layers; what it notes is compared too."""

    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList([make() for _ in range(4)])
        self.notes: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", F.mse_loss(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        self.notes.append(float(self.trainer.callback_metrics["val"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches(size: int = 8) -> DataLoader[Any]:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs.pow(2).sum(1, keepdim=True)), batch_size=size)


def fit(make: Callable[[], Model], devices: int, callbacks: Any = (), **options: Any) -> Model:
    seed_everything(0, verbose=False)
    module = make()
    settings = {"num_microbatches": 4, "verbose": False, **options.pop("strategy", {})}
    usual = {"max_steps": 4, "num_sanity_val_steps": 0, **QUIET, **options}
    made = [make() for make in callbacks]
    trainer = trainer_for(devices, settings if devices > 1 else None, callbacks=made, **usual)
    trainer.fit(module, batches(), batches() if options.get("val_check_interval") else None)
    return module


def assert_same(found: Model, expected: Model) -> None:
    assert [*found.state_dict()] == [*expected.state_dict()]
    for (name, ours), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert_like(found.notes, expected.notes)


def assert_like(found: Any, expected: Any) -> None:
    """Compare what was noted, numbers to rounding."""
    assert type(found) is type(expected)
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_like(ours, theirs)
    elif isinstance(expected, dict):
        assert_like([*found.items()], [*expected.items()])
    else:
        assert found == (pytest.approx(expected, rel=1e-3, abs=2e-5) if isinstance(expected, float) else expected)


def hooked(hook: str, action: Callable[[Model], None]) -> Callable[[], Model]:
    """Make a model that does something in a hook."""

    class Hooked(Model):
        pass

    setattr(Hooked, hook, lambda self, *_, **__: action(self))
    return Hooked


def checked(make: Callable[[], Model], strategy: Any = None, **options: Any) -> None:
    assert_same(fit(make, 3, strategy=strategy or {}, **options), fit(make, 1, **options))


# ------------------------------------------------------------------- writes


def constant(model: Model) -> None:
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.constant_(part.weight, 0.05)
            nn.init.zeros_(part.bias)


def half(model: Model) -> None:
    model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})


def clamped(model: Model) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.2, 0.2)


@torch.no_grad()
def copied(model: Model) -> None:
    for block in model.blocks:
        block.linear.weight.copy_(block.linear.weight.T.clone())
        block.linear.bias[2:4] = 0.25
        block.norm.weight.mul_(0.9).add_(0.1)


def through_views(model: Model) -> None:
    for block in model.blocks:
        block.linear.weight.detach().view(-1)[3:9].zero_()
        on_host = model.device.type == "cpu"  # or there is no array of its memory
        bias, weight = block.linear.bias.data, block.norm.weight.detach()
        (bias.numpy() if on_host else bias)[1] = 0.125
        (np.asarray(weight) if on_host else weight)[...] *= 0.5


def new_data(model: Model) -> None:
    for block in model.blocks:
        block.linear.weight.data = block.linear.weight.data * 0.75
        block.linear.bias.data = torch.full((WIDTH,), 0.1, device=model.device)


def buffers(model: Model) -> None:
    for index, block in enumerate(model.blocks):
        block.gain.mul_(0.5 + index / 8)


def new_buffers(model: Model) -> None:
    for index, block in enumerate(model.blocks):
        block.gain = torch.full((WIDTH,), 0.3 + index / 8, device=model.device)


def foreach(model: Model) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(model.parameters()), 0.9)
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector * 0.9, model.parameters())


WRITES = [constant, half, clamped, copied, through_views, new_data, buffers, new_buffers, foreach]
PLACES = [("on_train_batch_end", action) for action in WRITES] + [
    (hook, action) for hook in ("on_fit_start", "on_train_start") for action in (constant, half, new_buffers)
]
PLACES += [("on_train_batch_start", new_data), ("on_before_optimizer_step", copied), ("on_after_backward", clamped)]


@pytest.mark.parametrize(
    ("hook", "action"),
    all_slow_but(
        PLACES,
        ("on_train_batch_end", through_views),
        ("on_train_batch_end", new_buffers),
        ("on_fit_start", constant),
        ("on_train_batch_start", new_data),
        ("on_after_backward", clamped),
    ),
)
def test_what_is_written_in_a_hook_reaches_the_workers(hook: str, action: Callable[[Model], None]) -> None:
    checked(hooked(hook, action))


@pytest.mark.parametrize("action", [slow(clamped), new_buffers])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_validation_start", "on_train_end"])
def test_what_is_written_between_epochs_reaches_the_workers(hook: str, action: Callable[[Model], None]) -> None:
    checked(hooked(hook, action), max_steps=-1, max_epochs=2, val_check_interval=1.0)


def test_weights_held_by_user_code_stay_the_weights() -> None:
    class Holding(Model):
        def on_fit_start(self) -> None:
            self.held = [parameter.detach() for parameter in self.parameters()], self.state_dict()

        def on_train_batch_end(self, *_: Any) -> None:
            weights, state = self.held
            self.notes += [float(weight.sum()) for weight in weights] + [float(value.sum()) for value in state.values()]
            weights[4].mul_(0.9)

    checked(Holding)


def scale(model: Model) -> None:
    model.blocks[1].linear.weight.data.mul_(0.9)


def test_weights_written_inside_of_a_step_are_exact_before_the_blocks_and_refused_behind_them() -> None:
    class Before(Model):
        def training_step(self, batch: Any, index: int) -> Tensor:
            scale(self)
            return super().training_step(batch, index)

    class After(Model):
        def on_train_batch_start(self, *_: Any) -> None:
            self.notes.append(float(self.blocks[1].linear.weight.detach().sum()))

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            scale(self)
            return loss

    checked(Before)  # the step runs once
    with pytest.raises(SkipPipeError, match=r"in the middle of a step|was changed inside of a step"):
        fit(After, 3)
    checked(hooked("on_train_batch_end", scale))  # the ways out
    checked(Before, strategy={"num_microbatches": 1})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda block: setattr(block, "norm", nn.LayerNorm(WIDTH)), "norm"),
        (lambda block: setattr(block.linear, "weight", nn.Parameter(torch.zeros(WIDTH, WIDTH))), r"linear\.weight"),
        (lambda block: block.register_buffer("other", torch.zeros(2)), r"blocks\.1\.other"),
        (lambda block: setattr(block, "gain", None), r"blocks\.1\.gain"),
        (lambda block: block.linear.register_parameter("first", block.linear._parameters.pop("weight")), "first"),
    ],
)
def test_changed_structure_is_refused(change: Callable[[nn.Module], None], named: str) -> None:
    with pytest.raises(SkipPipeError, match=rf"{named} .*(replaced|added)"):
        fit(hooked("on_train_start", lambda model: change(model.blocks[1])), 3)


def test_another_form_is_refused() -> None:
    def half_precision(model: Model) -> None:
        model.blocks[1].linear.weight.data = model.blocks[1].linear.weight.data.half()

    with pytest.raises(SkipPipeError, match=r"cannot become torch\.float16"):
        fit(hooked("on_train_start", half_precision), 3)


# -------------------------------------------------------------------- reads


def saved(model: Model) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.notes += [float(value.sum()) for value in torch.load(file).values()]


def statistics(model: Model) -> None:
    for name, parameter in model.named_parameters():
        model.notes += [float(parameter.norm()), parameter.abs().max().item(), len(name), parameter.tolist()]
        model.notes.append(float(parameter[0].detach().mean()))


def duplicated(model: Model) -> None:
    for twin in (copy.deepcopy(model.blocks), pickle.loads(pickle.dumps(model.blocks)), copy.deepcopy(model).blocks):
        assert all(type(block) is Block for block in twin)
        model.notes += [float(parameter.sum()) for parameter in twin.parameters()]
        with torch.no_grad():
            model.notes.append(float(twin[0](torch.ones(1, WIDTH, device=model.device)).sum()))


def duplicated_tensors(model: Model) -> None:
    for parameter in model.parameters():
        twin = copy.deepcopy(parameter)
        assert type(twin) is nn.Parameter
        model.notes += [float(twin.sum()), float(parameter.clone().sum()), parameter.numpy(force=True).tolist()]


def compared(model: Model) -> None:
    model.notes.append([torch.equal(a, b) for a in model.parameters() for b in model.parameters()])
    model.notes.append(float(nn.utils.parameters_to_vector(model.parameters()).norm()))
    model.notes.append([str(parameter.device) + str(parameter.is_meta) for parameter in model.parameters()])


READS = [saved, statistics, duplicated, duplicated_tensors, compared]


@pytest.mark.parametrize("action", all_slow_but(READS, statistics, duplicated_tensors))
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_end", slow("on_train_end")])
def test_what_is_read_in_a_hook_is_what_the_workers_have(hook: str, action: Callable[[Model], None]) -> None:
    checked(hooked(hook, action))


def test_an_average_of_weights_is_that_of_one_process() -> None:
    class Average(Model):
        def on_train_start(self) -> None:
            self.average = {name: tensor.clone() for name, tensor in self.state_dict().items()}
            self.teacher = [copy.deepcopy(self.blocks)]

        @torch.no_grad()
        def on_train_batch_end(self, *_: Any) -> None:
            for name, tensor in self.state_dict().items():
                self.average[name].lerp_(tensor, 0.5)
            for mean, parameter in zip(self.teacher[0].parameters(), self.blocks.parameters(), strict=True):
                mean.mul_(0.9).add_(parameter, alpha=0.1)
            self.notes += [float(value.sum()) for value in self.average.values()]
            self.notes += [float(value.sum()) for value in self.teacher[0].parameters()]

    checked(Average)


def test_a_teacher_computes_in_the_step() -> None:
    class Taught(Model):
        def on_train_start(self) -> None:
            self.teacher = [copy.deepcopy(self.blocks).eval()]

        def training_step(self, batch: Any, index: int) -> Tensor:
            with torch.no_grad():
                wanted = self.teacher[0][0](self.embed(batch[0])).mean(1, keepdim=True)
            return F.mse_loss(self(batch[0]), batch[1] + wanted)

    checked(Taught)


def test_a_penalty_on_weights_is_refused_and_weight_decay_is_exact() -> None:
    class Penalised(Model):
        def training_step(self, batch: Any, index: int) -> Tensor:
            penalty = sum(parameter.square().sum() for parameter in self.blocks.parameters())
            return super().training_step(batch, index) + 1e-3 * penalty

    class Decayed(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.1)

    with pytest.raises(SkipPipeError, match="weight_decay"):
        fit(Penalised, 3)
    checked(Decayed)


def test_weights_read_before_the_blocks_are_right_inside_of_a_step() -> None:
    class Reading(Model):
        def training_step(self, batch: Any, index: int) -> Tensor:
            with torch.no_grad():
                total = sum(parameter.square().sum() for parameter in self.blocks.parameters())
            return super().training_step(batch, index) * (1 + total / 100)

    checked(Reading)


def test_state_dicts_have_the_names_that_the_module_gives(tmp_path: Any) -> None:
    class Renamed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.blocks

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {f"net.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict({k.removeprefix("net."): v for k, v in state.items()}, *args, **kwargs)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.world_size}{isinstance(trainer.strategy, SkipPipeStrategy)}")

    ours, theirs = fit(Renamed, 3, callbacks=[Save]), fit(Renamed, 1, callbacks=[Save])
    assert_same(ours, theirs)
    states = [torch.load(tmp_path / name, weights_only=False)["state_dict"] for name in ("1True", "1False")]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- gradients


def norms(model: Model) -> None:
    model.notes.append({name: float(value) for name, value in grad_norm(model, 2).items()})


def scaled(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad.mul_(0.5)


def masked(model: Model) -> None:
    for block in model.blocks:
        block.linear.weight.grad = block.linear.weight.grad * (block.linear.weight.abs() > 0.1)
        block.norm.bias.grad = None


def clipped(model: Model) -> None:
    model.notes.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def dropped(model: Model) -> None:
    model.blocks[0].zero_grad()
    for parameter in model.blocks[3].parameters():
        del parameter.grad


GRADIENTS = [
    ("on_before_optimizer_step", norms, {}),
    ("on_before_optimizer_step", scaled, {"gradient_clip_val": 0.5}),
    ("on_before_optimizer_step", masked, {"accumulate_grad_batches": 2}),
    ("on_after_backward", norms, {"accumulate_grad_batches": 2}),
    ("on_after_backward", scaled, {"accumulate_grad_batches": 2}),
    ("on_after_backward", masked, {"gradient_clip_val": 0.5}),
    ("on_before_optimizer_step", dropped, {}),
    ("configure_gradient_clipping", clipped, {}),
    ("configure_gradient_clipping", norms, {"accumulate_grad_batches": 2}),
    ("on_train_batch_end", norms, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}),
]


@pytest.mark.parametrize(("hook", "action", "options"), all_slow_but(GRADIENTS, *GRADIENTS[1:4], *GRADIENTS[6:8]))
def test_gradients_are_read_and_written(hook: str, action: Callable[[Model], None], options: Any) -> None:
    checked(hooked(hook, action), **options)


def test_gradients_are_there_until_the_next_step_and_clipped_like_all() -> None:
    def noted(model: Model) -> None:
        model.notes.append([None if p.grad is None else float(p.grad.sum()) for p in model.parameters()])

    class Clipping(Model):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            noted(self)

        def on_train_start(self) -> None:
            noted(self)

        def on_train_batch_end(self, *_: Any) -> None:
            noted(self)

    checked(Clipping)
    with pytest.raises(SkipPipeError, match="dropped when the next training step begins"):
        fit(hooked("on_before_zero_grad", noted), 3)
    checked(hooked("on_before_zero_grad", lambda model: model.zero_grad()))


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("when", [slow("__init__"), "on_fit_start"])
def test_hooks_on_gradients_are_refused_with_a_way_out(when: str, method: str) -> None:
    def mask(gradient: Tensor) -> Tensor:
        return gradient.clamp(-1e-3, 1e-3)

    class Hooked(Model):
        def register(self) -> None:
            getattr(self.blocks[1].linear.weight, method)(mask)

        def __init__(self) -> None:
            super().__init__()
            if when == "__init__":
                self.register()

        def on_fit_start(self) -> None:
            if when == "on_fit_start":
                self.register()

    class Changed(Model):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.blocks[1].linear.weight.grad = mask(self.blocks[1].linear.weight.grad)

    with pytest.raises(SkipPipeError, match="on_before_optimizer_step"):
        fit(Hooked, 3)
    checked(Changed)


@pytest.mark.parametrize("options", [slow({}), {"accumulate_grad_batches": 2}], ids=str)
def test_hooks_on_gradients_of_what_stays_on_the_driver_get_the_whole_gradient(options: Any) -> None:
    def clamp(bias: Tensor) -> None:
        bias.grad.clamp_(-0.02, 0.02)

    class Hooked(Model):
        def __init__(self) -> None:
            super().__init__()
            self.embed.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
            self.head.weight.register_hook(lambda gradient: self.notes.append(float(gradient.norm())))
            self.head.bias.register_post_accumulate_grad_hook(clamp)

    checked(Hooked, **options)


# --------------------------------------------------- modules of unusual memory


def weight_normed() -> nn.Module:
    block = Block()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.linear)
    return block


def parametrized() -> nn.Module:
    block = Block()
    nn.utils.parametrizations.weight_norm(block.linear)
    return block


def pruned() -> nn.Module:
    block = Block()
    nn.utils.prune.random_unstructured(block.linear, "weight", 0.5)
    return block


def in_a_graph() -> nn.Module:
    block = Block()
    block.graph = [block.linear.weight.square().sum()]
    return block


MODULES = {
    "gru": lambda: Gated(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "lstm": lambda: Gated(nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)),
    "rnn": lambda: Gated(nn.RNN(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)),
    "gru cell": lambda: Gated(nn.Sequential(nn.Flatten(1), nn.GRUCell(WIDTH, WIDTH), nn.Unflatten(1, (1, WIDTH)))),
    "old weight norm": weight_normed,
    "parametrized": parametrized,
    "pruned": pruned,
    "spectral norm": lambda: Gated(nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))),
}


@pytest.mark.parametrize("driver_stage", [False, slow(True)])
@pytest.mark.parametrize(
    "name", all_slow_but(MODULES, "lstm", "gru cell", "old weight norm", "parametrized", "spectral norm")
)
def test_modules_whose_memory_cannot_be_swapped(name: str, driver_stage: bool) -> None:
    if name == "spectral norm":  # its power iteration runs once for each microbatch
        strategy = {"driver_stage": driver_stage, "num_microbatches": 1}
    else:
        strategy = {"driver_stage": driver_stage}
    checked(lambda: Model(MODULES[name]), strategy=strategy)


# ------------------------------------------------------------ after failures


class UserError(Exception):
    pass


def failing(hook: str, error: type[Exception]) -> Callable[[], Model]:
    def fail(model: Model) -> None:
        raise error("no")

    return hooked(hook, fail)


@pytest.mark.parametrize(
    "hook", ["on_fit_start", "training_step", slow("on_before_optimizer_step"), "on_train_batch_end"]
)
@pytest.mark.parametrize("block", [Block, MODULES["gru"]])
def test_the_model_is_whole_after_an_error(hook: str, block: Callable[[], nn.Module]) -> None:
    class Failing(failing(hook, UserError)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(block)

    models = []
    for devices in (3, 1):
        seed_everything(0, verbose=False)
        module = Failing()
        pipeline = {"strategy": SkipPipeStrategy(verbose=False)} if devices > 1 else {}
        trainer = Trainer(accelerator="cpu", devices=devices, max_steps=2, **QUIET, **pipeline)
        with pytest.raises(UserError):
            trainer.fit(module, batches())
        models.append(module)
    ours, theirs = models
    assert_same(ours, theirs)
    inputs = torch.ones(2, 4)
    torch.testing.assert_close(ours(inputs), theirs(inputs))
    ours(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    setattr(Failing, hook, getattr(Model, hook))
    Trainer(accelerator="cpu", devices=1, max_steps=1, **QUIET).fit(ours, batches())


def test_the_model_is_whole_when_the_hand_over_fails() -> None:
    class Locked(Block):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    seed_everything(0, verbose=False)
    module = Model(Locked)
    before, inputs = copy.copy(module.state_dict()), torch.ones(2, 4)
    expected = module(inputs)
    trainer = Trainer(accelerator="cpu", devices=3, max_steps=1, strategy=SkipPipeStrategy(verbose=False), **QUIET)
    with pytest.raises(SkipPipeError, match="cannot be sent to a worker"):
        trainer.fit(module, batches())
    assert all(before[name].data_ptr() == value.data_ptr() for name, value in module.state_dict().items())
    torch.testing.assert_close(module(inputs), expected)
    for block in module.blocks:
        assert type(block) is Locked
        assert not block.lock.locked()


@pytest.mark.parametrize("action", [clamped, saved, new_buffers])
def test_writes_with_skipped_stages_do_not_fail(action: Callable[[Model], None]) -> None:
    model = fit(hooked("on_train_batch_end", action), 3, strategy={"skip_ratio": 0.5})
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    if action is clamped:
        assert all(float(parameter.abs().max()) <= 0.2 + 1e-6 for parameter in model.parameters())


# ------------------------------------------------- lost workers, and accelerate


class Loses(Callback):
    """Kills a worker in the middle of the run, after the weights were read and written."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        clamped(module)  # type: ignore[arg-type]
        if index == 1 and isinstance(trainer.strategy, SkipPipeStrategy):
            os.kill(min(trainer.strategy.worker_pids.values()), signal.SIGKILL)


def test_what_is_written_survives_a_lost_worker() -> None:
    """A replica has all of it, so nothing is lost with a worker."""
    strategy = {"replicas": 2, "num_microbatches": 4}

    def run(devices: int, **options: Any) -> Model:
        recovery = [functools.partial(StageRecovery, spares=1)] if devices > 1 else []
        return fit(Model, devices, callbacks=[Loses, *recovery], **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(run(5, strategy=strategy), run(1))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(functools.reduce(lambda hidden, block: block(hidden), self.blocks, self.embed(inputs)))


def accelerated(kind: type[Accelerator], **options: Any) -> list[Any]:
    """Run a loop that keeps an average, clips by torch's function, and copies the model."""
    seed_everything(0, verbose=False)
    accelerator, notes = kind(cpu=True, **options), []
    model = Stack()
    model, optimizer, data = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05), batches())
    average = copy.deepcopy(model)
    for inputs, wanted in data:
        accelerator.backward(F.mse_loss(model(inputs), wanted))
        notes.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 0.5)
                parameter.clamp_(-0.3, 0.3)
    notes += [float(value.sum()) for each in (average, model) for value in each.state_dict().values()]
    notes.append(average(torch.ones(1, 4)).item())
    accelerator.end_training()
    return notes


def test_loops_of_accelerate_read_and_write_too() -> None:
    found = accelerated(SkipPipeAccelerator, num_stages=2, num_microbatches=4, verbose=False)
    assert_like(found, accelerated(Accelerator))
