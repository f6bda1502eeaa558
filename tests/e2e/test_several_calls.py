"""Steps that call the blocks several times before their loss is there: as in one process."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import SkipPipeStrategy, checks
from skippipe_plugin.strategies.checks import check_several_calls
from skippipe_plugin.testing import At, Injector, Kill, Phase
from tests.e2e.modules import loader
from tests.e2e.support import Run, assert_same_run, train
from tests.grids import all_slow_but

DATA = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
Make = Callable[[], LightningModule]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        change = torch.tanh(self.linear(self.norm(hidden)))
        return hidden + (change if mask is None else change * mask)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def encoded(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return functools.reduce(lambda h, block: block(h, mask), self.blocks, self.embed(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoded(x))


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def loss(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Tensor, _: int) -> Any:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val_loss", self.net(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Contrastive(Module):
    """Two views of each sample, against those of the others."""

    def loss(self, batch: Tensor) -> Tensor:
        one, other = (F.normalize(self.net.encoded(view), dim=1) for view in (batch, batch.flip(1)))
        return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(batch), device=one.device))


class Triplet(Module):
    """Three calls, of inputs of different numbers."""

    def loss(self, batch: Tensor) -> Tensor:
        half = len(batch) // 2
        anchor, near = self.net.encoded(batch[:half]), self.net.encoded(batch[:half] + 0.1)
        return F.triplet_margin_loss(anchor, near, self.net.encoded(batch[half : 2 * half]), margin=3.0)


class Preferring(Module):
    """A policy on two answers, beside a frozen reference, as in direct preference optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = nn.Linear(4, 1).requires_grad_(False)

    def loss(self, batch: Tensor) -> Tensor:
        chosen, rejected = batch + 0.5, batch - 0.5
        with torch.no_grad():
            before = self.reference(chosen) - self.reference(rejected)
        return -F.logsigmoid(0.5 * (self.net(chosen) - self.net(rejected) - before)).mean()


class Recurrent(Module):
    """The blocks on what they have made, again and again (a universal transformer), with the first input added."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden, losses = self.net.embed(batch), []
        for _ in range(3):
            hidden = functools.reduce(lambda h, block: block(h), self.net.blocks, hidden) + self.net.embed(batch)
            losses.append(F.mse_loss(self.net.head(hidden), batch.sum(1, keepdim=True)))
        return torch.stack(losses).sum()


class Masked(Module):
    """A call with a mask of each sample's own, and one without any."""

    def loss(self, batch: Tensor) -> Tensor:
        mask = (batch.sum(1, keepdim=True) > 0).float()
        return F.mse_loss(self.net.encoded(batch, mask), self.net.encoded(batch).detach() + 0.5) + F.mse_loss(
            self.net(batch), batch.sum(1, keepdim=True)
        )


class Bootstrapped(Module):
    """A call without gradients that makes the targets of one with them."""

    def loss(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.net(batch) + batch.sum(1, keepdim=True)
        return F.mse_loss(self.net(batch), targets)


class Perturbed(Module):
    """Noise on the driver, drawn as in one process, and a second call that makes the first one's targets."""

    def loss(self, batch: Tensor) -> Tensor:
        targets = self.net(batch)
        return F.mse_loss(self.net(batch + 0.1 * torch.randn_like(batch)), targets.detach()) + targets.pow(2).mean()


class Conditioned(Module):
    """Blocks that get a conditioning vector with a gradient, once as it is and once without any (guidance)."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(4, 8)

    def loss(self, batch: Tensor) -> Tensor:
        condition = torch.sigmoid(self.condition(batch))
        made = self.net.head(self.net.encoded(batch, condition)) + self.net(batch) * condition.mean()
        return F.mse_loss(made, batch.sum(1, keepdim=True))


MODULES = [Contrastive, Triplet, Preferring, Recurrent, Masked, Bootstrapped, Perturbed, Conditioned]
LAYOUTS: list[dict[str, Any]] = [
    {"num_microbatches": 2, "driver_stage": True},
    {"num_microbatches": 1},
    {"num_microbatches": 4, "microbatches": "stack", "schedule": "gpipe"},
]


def fit(make: Make, devices: int, strategy: dict[str, Any] | None = None, **options: Any) -> Run:
    return train(make, loader(DATA, 8), devices, strategy, **{"max_steps": -1, "max_epochs": 1, **options})


def assert_exact(make: Make, strategy: dict[str, Any] | None = None, **options: Any) -> None:
    assert_same_run(fit(make, 3, strategy or {"num_microbatches": 4}, **options), fit(make, 1, **options))


@pytest.mark.parametrize(
    "make",
    all_slow_but(MODULES, Contrastive, Masked, Bootstrapped, Perturbed, Conditioned),
    ids=lambda make: make.__name__,
)
def test_steps_with_several_calls_are_those_of_one_process(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert_exact(make)
    said = [record.message for record in caplog.records if "calls the blocks" in record.message]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        pytest.param(make, layout, id=f"{make.__name__}-{at}", marks=() if at == index else pytest.mark.slow)
        for index, make in enumerate([Contrastive, Recurrent, Conditioned])
        for at, layout in enumerate(LAYOUTS)
    ],
)
def test_so_they_are_in_any_layout(make: Make, layout: dict[str, Any]) -> None:
    assert_exact(make, layout)


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"val_data": loader(DATA[:9], 4)}],
    ids=["accumulated", "clipped", "validated"],
)
def test_so_they_are_with_what_the_trainer_does(options: dict[str, Any]) -> None:
    assert_exact(Preferring, max_epochs=2, **options)


def test_weights_are_averaged_as_in_one_process() -> None:
    runs = [
        fit(Contrastive, devices, strategy, callbacks=[EMAWeightAveraging(decay=0.9)], max_epochs=2)
        for devices, strategy in ((3, {"num_microbatches": 4}), (1, None))
    ]
    assert_same_run(*runs)


def test_a_resumed_run_goes_on_as_one_process(tmp_path: Path) -> None:
    def resumed(devices: int, strategy: dict[str, Any] | None = None) -> Run:
        folder = tmp_path / str(devices)
        save = ModelCheckpoint(folder, save_last=True)
        fit(Recurrent, devices, strategy, callbacks=[save], enable_checkpointing=True)
        return fit(Recurrent, devices, strategy, ckpt_path=str(folder / "last.ckpt"), max_epochs=2)

    assert_same_run(resumed(3, {"num_microbatches": 2}), resumed(1))


@pytest.mark.parametrize(
    ("accumulated", "nth", "who"),
    [
        (1, 3, 2),
        (2, 5, 2),
        *(pytest.param(1, nth, who, marks=pytest.mark.slow) for nth in range(1, 7) for who in (1, 2, 3, 4)),
        *(pytest.param(2, nth, who, marks=pytest.mark.slow) for nth in (2, 3) for who in (1, 2, 3, 4)),
    ],
)
def test_a_worker_that_is_lost_in_any_call_is_replaced(nth: int, accumulated: int, who: int) -> None:
    """Each step has three parts: the first call, the second one with its way back, and the first once more with its."""
    options: dict[str, Any] = {"accumulate_grad_batches": accumulated}
    with Injector(Kill(At(Phase.TRAINING, nth=nth), who=who)) as injector:
        layout = {"num_microbatches": 4, "replicas": 2}
        found = fit(Contrastive, 5, layout, callbacks=[StageRecovery(spares=1)], **options)
    assert [each.done for each in injector.report] == [True]
    assert_same_run(found, fit(Contrastive, 1, **options))


def test_batches_of_one_sample() -> None:
    def run(devices: int, strategy: dict[str, Any] | None = None) -> Run:
        return train(Recurrent, loader(DATA[:6], 1), devices, strategy, max_steps=6)

    assert_same_run(run(3, {"num_microbatches": 4}), run(1))


class Changing(Contrastive):
    """Changes its batch, which is tried before."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        return super().training_step(batch.mul_(0.5), index)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_batch_that_was_tried_is_as_before(num_microbatches: int) -> None:
    assert_exact(Changing, {"num_microbatches": num_microbatches})


class Watched(Contrastive):
    """Has a hook that collects what a block computes."""

    def on_train_start(self) -> None:
        kept: list[Tensor] = []
        self.net.blocks[1].register_forward_hook(lambda module, args, output: kept.append(output))


def test_hooks_on_blocks_that_several_calls_run_are_refused() -> None:
    with pytest.raises(SkipPipeError, match=r"a forward hook of yours watches net\.blocks\.1"):
        fit(Watched, 3, {"num_microbatches": 2})


class Trying(Contrastive):
    """Looks at what is between the blocks, and swallows what is refused."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden, norms = self.net.embed(batch), []
        for block in self.net.blocks:
            hidden = block(hidden)
            with contextlib.suppress(Exception):
                norms.append(float(hidden.detach().norm()))
        return F.mse_loss(self.net.head(hidden), self.net(batch) + len(norms))


def test_a_refusal_that_is_swallowed_is_raised() -> None:
    with pytest.raises(SkipPipeError, match="needs the output of net"):
        fit(Trying, 3, {"num_microbatches": 1})


class Hooked(Contrastive):
    """Has a gradient hook on what enters the blocks, which the loss uses beside them, too."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net.embed(batch)
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
        made = functools.reduce(lambda h, block: block(h), self.net.blocks, hidden)
        return F.mse_loss(self.net.head(made + hidden), self.net(batch))


def test_a_gradient_hook_that_would_see_half_is_refused() -> None:
    with pytest.raises(SkipPipeError, match="its gradient comes in two parts"):
        fit(Hooked, 3, {"num_microbatches": 2})


def test_steps_that_shall_be_cut_are_refused() -> None:
    with pytest.raises(SkipPipeError, match=r"microbatches=.stack."):
        fit(Contrastive, 3, {"num_microbatches": 2, "microbatches": "batch"})


def test_a_driver_that_may_start_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "supervised", lambda: True)
    with pytest.raises(SkipPipeError, match="skippipe run"):
        check_several_calls(SkipPipeStrategy().settings)


def test_several_drivers_are_refused() -> None:
    with pytest.raises(SkipPipeError, match="drivers=2"):
        check_several_calls(SkipPipeStrategy(drivers=2).settings)


class Detached(Recurrent):
    """Trains the head alone, with the blocks called twice: nothing goes back through them."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net.embed(batch)
        for _ in range(2):
            hidden = functools.reduce(lambda h, block: block(h), self.net.blocks, hidden)
        return F.mse_loss(self.net.head(hidden.detach()), batch.sum(1, keepdim=True))


class Sampling(Callback):
    """Calls the blocks between steps, while workers may wait for what goes back."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Tensor, index: int) -> None:
        with torch.no_grad():
            self.seen.append(module.net(batch).mean().item())


def test_what_does_not_go_back_keeps_no_worker_waiting() -> None:
    seen = [Sampling(), Sampling()]
    runs = [
        fit(Detached, devices, strategy, callbacks=[each])
        for each, devices, strategy in zip(seen, (3, 1), ({"num_microbatches": 4}, None), strict=True)
    ]
    assert_same_run(*runs)
    torch.testing.assert_close(seen[0].seen, seen[1].seen)
