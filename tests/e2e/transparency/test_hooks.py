"""Forward hooks on blocks and their parts: they see what they would see in one process, or are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train, trainer_for
from tests.grids import all_slow_but, slow

DATA = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.act = nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return hidden + self.act(self.linear(self.norm(hidden))) * scale


class Model(LightningModule):
    """``watch`` registers hooks, at ``when``; ``loss_of`` makes a further loss of what they have collected."""

    def __init__(
        self,
        watch: Callable[[Any], Any],
        when: str = "__init__",
        loss_of: Callable[[list[Any]], Any] = lambda seen: 0.0,
    ) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.seen: list[Any] = []
        self.logged: list[float] = []
        self.watch, self.when, self.loss_of = watch, when, loss_of
        self.now("__init__")

    def now(self, when: str) -> None:
        if when == self.when:
            self.handle = self.watch(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)
        return self.head(hidden)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.seen.clear()
        self.now("training_step")
        loss = F.mse_loss(self(batch), batch.sum(1, keepdim=True)) + self.loss_of(self.seen)
        if self.when == "training_step":
            self.handle.remove()
        self.logged += [len(batch) * float(value.detach().mean()) for value in self.seen if isinstance(value, Tensor)]
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.seen.clear()
        self.now("validation_step")
        self(batch)
        if self.when == "validation_step":
            self.handle.remove()
        self.logged += [len(batch) * float(value.mean()) for value in self.seen if isinstance(value, Tensor)]

    def on_fit_start(self) -> None:
        self.now("on_fit_start")

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        self.now(f"batch {index}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(make: Callable[[], LightningModule], devices: int = 3, **strategy: Any) -> Any:
    pipe = {"num_microbatches": 4, "verbose": False, **strategy} if devices > 1 else None
    options = {"max_steps": 5, "max_epochs": 2, "val_data": loader(DATA), "num_sanity_val_steps": 0}
    return train(make, loader(DATA), devices, pipe, **options)


def assert_exact(make: Callable[[], LightningModule], devices: int = 3, **strategy: Any) -> None:
    """The same run, and the hooks saw the same, once for a batch."""
    plain, piped = fit(make, 1), fit(make, devices, **strategy)
    assert_same_run(piped, plain)
    assert len(plain.module.logged) > 0
    assert piped.module.logged == pytest.approx(plain.module.logged, rel=1e-4)


def output_of_a_block(model: Any) -> Any:
    return model.blocks[1].register_forward_hook(lambda module, args, out: model.seen.append(out))


def output_of_a_part(model: Any) -> Any:
    return model.blocks[2].linear.register_forward_hook(lambda module, args, out: model.seen.append(out))


def input_of_a_part(model: Any) -> Any:
    return model.blocks[2].act.register_forward_pre_hook(lambda module, args: model.seen.append(args[0]))


def keyword_arguments(model: Any) -> Any:
    def look(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        model.seen.append(out * kwargs["scale"])

    return model.blocks[0].register_forward_hook(look, with_kwargs=True)


class Collector:
    def __init__(self, into: list[Any]) -> None:
        self.into = into

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        self.into.append(out - args[0])

    def before(self, module: nn.Module, args: Any) -> None:
        self.into.append(args[0])


def an_object(model: Any) -> Any:
    return model.blocks[3].register_forward_hook(Collector(model.seen))


def a_method(model: Any) -> Any:
    return model.blocks[3].register_forward_pre_hook(Collector(model.seen).before)


WATCHES = [output_of_a_block, output_of_a_part, input_of_a_part, keyword_arguments, an_object, a_method]


def squares(seen: list[Any]) -> Any:
    return sum(value.pow(2).mean() for value in seen)


@pytest.mark.parametrize("loss_of", [slow(lambda seen: 0.0), squares], ids=["watched", "in the loss"])
@pytest.mark.parametrize(
    "watch",
    all_slow_but(WATCHES, output_of_a_block, input_of_a_part, keyword_arguments, a_method),
    ids=lambda watch: watch.__name__,
)
def test_a_hook_sees_what_it_would_see_in_one_process(
    watch: Callable[[Any], Any], loss_of: Callable[[list[Any]], Any]
) -> None:
    assert_exact(lambda: Model(watch, loss_of=loss_of))


@pytest.mark.parametrize("when", [slow("on_fit_start"), "batch 1", "training_step", slow("validation_step")])
def test_it_may_be_registered_at_any_time(when: str) -> None:
    assert_exact(lambda: Model(output_of_a_part, when, squares))


class LateInTheStep(Model):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if index == 2:
            self.handle = output_of_a_block(self)
        return super().training_step(batch, index)


class LateByAGlobalName(Model):
    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if BEGUN["batches"] == 3:
            self.handle = output_of_a_block(self)
        return super().training_step(batch, index)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        BEGUN["batches"] += 1


BEGUN = {"batches": 0}


def test_a_step_that_registers_it_late_is_refused() -> None:
    """The batch is cut by then; registered before the step the hook sees all of it."""
    with pytest.raises(SkipPipeError, match=r"Register it before the step \(in on_train_batch_start"):
        fit(lambda: LateByAGlobalName(lambda _: None))
    assert_exact(lambda: Model(output_of_a_block, "batch 2", squares))


def test_a_step_that_registers_it_late_by_the_number_of_its_batch() -> None:
    """It is known before that the number counts, so the step runs on the whole batch from the first one on."""
    assert_exact(lambda: LateInTheStep(lambda _: None))


def by_sums(seen: list[Any]) -> Any:
    return sum(value.pow(2).sum() for value in seen)


@pytest.mark.parametrize("where", ["auto", "batch"])
def test_a_loss_of_which_a_term_reduces_otherwise(where: Any) -> None:
    """What hooks have seen is no part of what the step gives when it is tried, so its loss follows no rule."""
    if where == "batch":
        with pytest.raises(SkipPipeError, match="forward hooks of yours watch modules of the blocks"):
            fit(lambda: Model(output_of_a_part, loss_of=by_sums), microbatches=where)
    else:
        assert_exact(lambda: Model(output_of_a_part, loss_of=by_sums), microbatches=where)


def all_blocks(model: Any) -> Any:
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: model.seen.append(out))


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (3, {"driver_stage": True}),
        (5, {"replicas": 2}),
        slow(3, {"schedule": "gpipe"}),
        slow(3, {"num_microbatches": 4}),
    ],
)
def test_hooks_on_every_block(devices: int, strategy: dict[str, Any]) -> None:
    assert_exact(lambda: Model(all_blocks, loss_of=squares), devices, **strategy)


class Predicting(Model):
    def predict_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch)


@pytest.mark.parametrize("watch", [slow(output_of_a_block), output_of_a_part, slow(input_of_a_part)])
def test_predictions_are_watched_too(watch: Callable[[Any], Any]) -> None:
    """Under inference mode, where torch does not count what is written."""
    found = []
    for devices in (1, 3):
        trained = fit(lambda: Predicting(watch), devices)
        trained.module.seen.clear()
        outputs = torch.cat(trained.trainer.predict(trained.module, loader(DATA)))
        found.append((outputs, torch.cat([value.detach() for value in trained.module.seen])))
    torch.testing.assert_close(*found)


def test_who_writes_in_predictions_is_refused() -> None:
    def watch(model: Any) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            model.seen.append(1)
            if not model.training and torch.is_inference_mode_enabled():
                out.mul_(2)

        return model.blocks[1].linear.register_forward_hook(hook)

    trained = fit(lambda: Predicting(watch), 1)
    trainer = trainer_for(3, {"num_microbatches": 4, "verbose": False})
    with pytest.raises(SkipPipeError, match=r"on blocks\.1\.linear writes into a tensor"):
        trainer.predict(trained.module, loader(DATA))


class Removing(Model):
    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        if index == 1:
            self.handle.remove()


def test_a_removed_hook_is_not_called_any_more() -> None:
    assert_exact(lambda: Removing(output_of_a_block, loss_of=squares))


def test_hooks_that_only_print_do_it_here(capfd: pytest.CaptureFixture[str]) -> None:
    def watch(model: Any) -> Any:
        return model.blocks[1].register_forward_hook(lambda module, args, out: print("hooked", tuple(out.shape)))

    fit(lambda: Model(watch), num_microbatches=1)
    assert capfd.readouterr().out.count("hooked (8, 8)") == 5 + 3  # training steps and validation batches


@pytest.mark.parametrize("how", [{"num_microbatches": 1}, {"num_microbatches": 4, "microbatches": "stack"}])
@pytest.mark.parametrize("driver_stage", [False, True])
def test_where_the_step_runs_once_so_do_the_hooks(how: dict[str, Any], driver_stage: bool) -> None:
    plain, piped = (
        fit(lambda: Model(all_blocks, loss_of=squares), devices, **how, driver_stage=driver_stage) for devices in (1, 3)
    )
    assert_same_run(piped, plain)
    assert piped.module.logged == pytest.approx(plain.module.logged, rel=1e-4)


# ------------------------------------------------- part of the computation


def doubles(model: Any) -> Any:
    return model.blocks[1].register_forward_hook(lambda module, args, out: out * 2)


def halves_the_input(model: Any) -> Any:
    return model.blocks[2].linear.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def doubles_and_looks(model: Any) -> Any:
    doubles(model)
    return output_of_a_block(model)


def looks_and_doubles(model: Any) -> Any:
    output_of_a_block(model)
    return doubles(model)


def spectral(model: Any) -> Any:
    torch.nn.utils.spectral_norm(model.blocks[1].linear)
    return None


@pytest.mark.parametrize("watch", [doubles, halves_the_input, spectral], ids=lambda watch: watch.__name__)
def test_a_hook_that_computes_runs_with_its_block(watch: Callable[[Any], Any]) -> None:
    plain, piped = fit(lambda: Model(watch), 1), fit(lambda: Model(watch), num_microbatches=1)
    assert_same_run(piped, plain)
    assert plain.losses != fit(lambda: Model(lambda _: None), 1).losses


@pytest.mark.parametrize("watch", [doubles_and_looks, looks_and_doubles], ids=lambda watch: watch.__name__)
def test_hooks_of_both_sorts_keep_their_order(watch: Callable[[Any], Any]) -> None:
    assert_exact(lambda: Model(watch, loss_of=squares))


# ----------------------------------------------------------------- refused


def keeps_and_changes(model: Any) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        model.seen.append(out)
        return out * 2

    return model.blocks[1].register_forward_hook(hook)


def writes_in_place(model: Any) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        model.seen.append(1)
        out.mul_(2)

    return model.blocks[1].linear.register_forward_hook(hook)


def looks_backward(model: Any) -> Any:
    return model.blocks[1].register_full_backward_hook(lambda module, before, after: model.seen.append(after))


def asks_for_the_gradient(model: Any) -> Any:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(model.seen.append)

    return model.blocks[1].register_forward_hook(hook)


@pytest.mark.parametrize(
    ("watch", "when", "message"),
    [
        (keeps_and_changes, "__init__", "the forward hook .*keeps_and_changes.* on blocks.1 returns a value"),
        (doubles, "batch 1", "the forward hook .*doubles.* on blocks.1 returns a value"),
        (writes_in_place, "__init__", "the forward hook .* on blocks.1.linear writes into a tensor"),
        (looks_backward, "__init__", "blocks.1 has a backward hook"),
        (looks_backward, "batch 1", "blocks.1 has a backward hook"),
        (asks_for_the_gradient, "__init__", "register_hook on what a forward hook of a remote block has seen"),
        (spectral, "batch 1", "the hook SpectralNorm was registered on blocks.1.linear after the blocks went"),
    ],
)
def test_what_cannot_be_so_is_refused(watch: Callable[[Any], Any], when: str, message: str) -> None:
    with pytest.raises(SkipPipeError, match=message):
        fit(lambda: Model(watch, when))


def test_hooks_for_all_modules_are_refused() -> None:
    def watch(model: Any) -> Any:
        return nn.modules.module.register_module_forward_hook(lambda *_: None)

    handles: list[Any] = []
    try:
        with pytest.raises(SkipPipeError, match="a forward or backward hook for all modules is registered"):
            fit(lambda: Model(lambda model: handles.append(watch(model)), "on_fit_start"))
    finally:
        for handle in handles:
            handle.remove()
