"""Modules that go back and step their optimizers themselves (``automatic_optimization = False``): as in one process."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import SkipPipeStrategy
from skippipe_plugin.strategies.checks import check_fit
from skippipe_plugin.testing import At, Injector, Kill, Phase
from tests.e2e.modules import loader
from tests.e2e.support import Run, assert_same_run, train, trainer_for

GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.randn(40, 4, generator=GENERATOR)
Make = Callable[[], LightningModule]
LAYOUTS: list[dict[str, Any]] = [
    {"num_microbatches": 4},
    {"num_microbatches": 2, "driver_stage": True, "schedule": "gpipe"},
    {"num_microbatches": 1},
]


class Block(nn.Module):
    """A residual block that draws nothing."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(drop)

    def forward(self, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        change = self.drop(torch.tanh(self.linear(self.norm(hidden))))
        return hidden + (change if scale is None else change * scale)


class Net(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, inputs: int = 4, outputs: int = 1, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(inputs, 8), nn.Linear(8, outputs)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functools.reduce(lambda h, block: block(h), self.blocks, self.embed(x)))


class Manual(LightningModule):
    """Steps one optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Net()

    def loss(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.net(batch), batch.pow(2).sum(1, keepdim=True))

    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Clipped(Manual):
    """Clips between backward and step."""

    algorithm, most = "norm", 0.1

    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # instead of manual_backward
        self.clip_gradients(optimizer, gradient_clip_val=self.most, gradient_clip_algorithm=self.algorithm)
        optimizer.step()
        return loss


class ClippedByValue(Clipped):
    algorithm, most = "value", 0.01


class ClippedAlone(Clipped):
    """Trains the head alone: no gradient comes to the blocks, which wait for one."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = functools.reduce(lambda h, block: block(h), self.net.blocks, self.net.embed(batch))
        return F.mse_loss(self.net.head(hidden.detach()), batch.pow(2).sum(1, keepdim=True))


class Accumulating(Manual):
    """Steps after every second batch."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss / 2)
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class TwiceForward(Manual):
    """Trains on two losses of two calls, one after the other, before one step."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        first = self.loss(batch)
        self.manual_backward(first)
        second = self.loss(-batch)
        self.manual_backward(0.5 * second)
        optimizer.step()
        return first.detach() + second.detach()


class WithClosure(Manual):
    """Gives the step a closure."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)
        return {"loss": self.loss(batch).detach()}


class Evaluated(Manual):
    """Looks at the model without gradients before it trains it, and once more in eval mode."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        with torch.no_grad():
            before = self.loss(batch)
        loss = super().training_step(batch, index)
        self.net.eval()
        with torch.inference_mode():
            after = self.loss(batch)
        self.net.train()
        return {"loss": loss.detach() + before + after.clone()}


class Unused(Manual):
    """Leaves every third batch out once its loss is there."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        if index % 3 == 1:
            return self.loss(batch).detach()
        return super().training_step(batch, index)


class Scaled(Manual):
    """Gives the blocks an argument of each sample's own, and a mask of as many rows that is all samples'."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net.embed(batch)[:, None].expand(-1, len(batch), -1).contiguous()
        scale = batch.abs().sum(1)[:, None, None] + torch.eye(len(batch), device=self.device)[..., None]
        for block in self.net.blocks:
            hidden = block(hidden, scale)
        return F.mse_loss(self.net.head(hidden).mean(1), batch.pow(2).sum(1, keepdim=True))


class Shared(Scaled):
    """Gives the blocks an argument that all samples share and that has as many rows as there are samples."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net.embed(batch)[:, None].expand(-1, len(batch), -1).contiguous()
        scale = torch.linspace(0, 1, len(batch), device=self.device)[:, None]
        for block in self.net.blocks:
            hidden = block(hidden, scale)
        return F.mse_loss(self.net.head(hidden).mean(1), batch.pow(2).sum(1, keepdim=True))


class SequenceFirst(Manual):
    """Has the samples in the second dimension."""

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.net.embed(torch.stack([batch, -batch, 2 * batch]))
        for block in self.net.blocks:
            hidden = block(hidden)
        return F.mse_loss(self.net.head(hidden).sum(0), batch.pow(2).sum(1, keepdim=True))


class Noisy(Manual):
    """Draws on the driver, before the blocks and after them."""

    def loss(self, batch: Tensor) -> Tensor:
        out = self.net(batch + 0.1 * torch.randn_like(batch))
        return F.mse_loss(out + 0.1 * torch.randn_like(out), batch.pow(2).sum(1, keepdim=True))


class TwoOptimizers(Manual):
    """One for the blocks, one for the rest, each with a scheduler."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        of_blocks, of_rest = self.optimizers()  # type: ignore[misc]
        loss = self.loss(batch)
        for optimizer in (of_blocks, of_rest):
            optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(of_rest, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        self.clip_gradients(of_blocks, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        for optimizer in (of_rest, of_blocks):
            optimizer.step()
        for scheduler in self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()
        return loss

    def configure_optimizers(self) -> Any:
        of_blocks = torch.optim.AdamW(self.net.blocks.parameters(), lr=1e-2)
        of_rest = torch.optim.SGD([*self.net.embed.parameters(), *self.net.head.parameters()], lr=1e-1, momentum=0.9)
        return [of_blocks, of_rest], [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (of_blocks, of_rest)]


class ZeroedAtTimes(TwoOptimizers):
    """Lets gradients of steps wait for further ones: those of one optimizer, of a module, of parameters."""

    def training_step(self, batch: Tensor, index: int) -> Any:
        of_blocks, of_rest = self.optimizers()  # type: ignore[misc]
        loss = self.loss(batch)
        self.manual_backward(loss)
        of_blocks.step()
        of_rest.step()
        if index == 1:
            of_rest.zero_grad()
        if index == 2:
            self.net.blocks[1].zero_grad()
        if index == 3:
            for parameter in self.net.parameters():
                parameter.grad = None
        return loss


class Critic(Manual):
    """A discriminator whose blocks are pipelined, against a generator: zeroed before its own backward only."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))

    def training_step(self, batch: Tensor, index: int) -> Any:
        generators, critics = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch), 3, device=self.device)
        g_loss = -self.net(self.generator(noise)).mean()
        generators.zero_grad()
        self.manual_backward(g_loss)
        generators.step()
        d_loss = self.net(self.generator(noise).detach()).mean() - self.net(batch).tanh().mean()
        critics.zero_grad()
        self.manual_backward(d_loss)
        critics.step()
        return {"loss": g_loss.detach() + d_loss.detach()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2, eps=1e-4) for part in (self.generator, self.net)]


class Gan(Manual):
    """A generator, whose blocks are pipelined, against a discriminator, as Lightning's documentation has it."""

    def __init__(self, *, toggles: bool = True, graph_of_fakes: bool = True) -> None:
        super().__init__()
        self.net = Net(3, 4)
        self.discriminator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.toggles, self.graph_of_fakes = toggles, graph_of_fakes

    def training_step(self, batch: Tensor, index: int) -> Any:
        generators, discriminators = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch), 3, device=self.device)
        real, fake = (torch.full((len(batch), 1), value, device=self.device) for value in (1.0, 0.0))

        if self.toggles:
            self.toggle_optimizer(generators)
        g_loss = F.binary_cross_entropy_with_logits(self.discriminator(self.net(noise)), real)
        self.manual_backward(g_loss)
        generators.step()
        generators.zero_grad()
        if self.toggles:
            self.untoggle_optimizer(generators)

        if self.toggles:
            self.toggle_optimizer(discriminators)
        with torch.set_grad_enabled(self.graph_of_fakes):
            made = self.net(noise)
        discriminators.zero_grad()
        d_loss = F.binary_cross_entropy_with_logits(self.discriminator(batch), real)
        d_loss = d_loss + F.binary_cross_entropy_with_logits(self.discriminator(made.detach()), fake)
        self.manual_backward(d_loss)
        discriminators.step()
        discriminators.zero_grad()
        if self.toggles:
            self.untoggle_optimizer(discriminators)
        return {"loss": g_loss.detach() + d_loss.detach()}

    def configure_optimizers(self) -> Any:
        betas = (0.5, 0.999)
        return [
            torch.optim.Adam(self.net.parameters(), lr=1e-2, betas=betas),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-2, betas=betas),
        ]

    def validation_step(self, batch: Tensor, _: int) -> None:
        self.log("val_loss", self.discriminator(self.net(batch[:, :3])).mean())


class Frozen(Manual):
    """Trains its head only."""

    def configure_optimizers(self) -> Any:
        self.net.blocks.requires_grad_(False)
        self.net.embed.requires_grad_(False)
        return torch.optim.SGD(self.net.head.parameters(), lr=0.1)


def fit(make: Make, devices: int, strategy: dict[str, Any] | None = None, **options: Any) -> Run:
    steps = {"max_steps": -1, "max_epochs": 1}
    return train(make, loader(DATA, 8), devices, strategy, **{**steps, **options})


def both(make: Make, strategy: dict[str, Any] | None = None, **options: Any) -> tuple[Run, Run]:
    return fit(make, 3, strategy or LAYOUTS[0], **options), fit(make, 1, **options)


@pytest.mark.parametrize(
    ("make", "layout"),
    [
        pytest.param(make, at, id=f"{make.__name__}-{at}", marks=() if at == index % len(LAYOUTS) else pytest.mark.slow)
        for index, make in enumerate([Manual, Gan, Accumulating, TwoOptimizers])
        for at in range(len(LAYOUTS))
    ],
)
def test_a_manual_step_is_that_of_one_process(make: Make, layout: int) -> None:
    assert_same_run(*both(make, LAYOUTS[layout]))


@pytest.mark.parametrize(
    "make",
    [
        *(Clipped, ClippedByValue, ClippedAlone, TwiceForward, WithClosure, Evaluated, Unused, Noisy, Frozen),
        functools.partial(Gan, toggles=False),
        functools.partial(Gan, graph_of_fakes=False),
        *(Critic, ZeroedAtTimes),
    ],
    ids=lambda make: getattr(make, "__name__", str(getattr(make, "keywords", ""))),
)
def test_what_manual_steps_do_is_that_of_one_process(make: Make) -> None:
    assert_same_run(*both(make))


@pytest.mark.parametrize("make", [Scaled, Shared, SequenceFirst], ids=lambda make: make.__name__)
def test_calls_are_cut_where_the_blocks_show_that_they_may_be(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    assert_same_run(*both(make))
    assert not [record for record in caplog.records if "whole batches" in record.message]


class Mixing(Manual):
    """Has blocks that look at all samples."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.net.blocks:
            block.norm = nn.BatchNorm1d(8)  # type: ignore[assignment]


def test_blocks_that_look_at_other_samples_get_the_whole_batch(caplog: pytest.LogCaptureFixture) -> None:
    assert_same_run(*both(Mixing))
    assert "whole batches" in caplog.text


def test_logged_values_and_validation_are_those_of_one_process() -> None:
    found, expected = both(Manual, val_data=loader(DATA[:10], 4), max_epochs=2)
    assert_same_run(found, expected)
    metrics = [
        {name: float(value) for name, value in run.trainer.callback_metrics.items()} for run in (found, expected)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    assert found.trainer.global_step == expected.trainer.global_step == 10


@pytest.mark.parametrize("make", [pytest.param(Manual, marks=pytest.mark.slow), TwoOptimizers])
def test_a_resumed_run_goes_on_as_one_process(make: Make, tmp_path: Path) -> None:
    def resumed(devices: int, strategy: dict[str, Any] | None = None) -> Run:
        folder = tmp_path / str(devices)
        save = ModelCheckpoint(folder, save_last=True)
        fit(make, devices, strategy, callbacks=[save], enable_checkpointing=True)
        return fit(make, devices, strategy, ckpt_path=str(folder / "last.ckpt"), max_epochs=2)

    found, expected = resumed(3, LAYOUTS[0]), resumed(1)
    assert_same_run(found, expected)
    states = [run.trainer.optimizers for run in (found, expected)]
    assert len(states[0]) == len(states[1])
    for own, other in zip(*states, strict=True):
        for mine, theirs in zip(own.state.values(), other.state.values(), strict=True):
            for name, value in theirs.items():
                torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (Manual, "bf16-mixed"),
        (Gan, "16-mixed"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in [(Manual, "16-mixed"), (TwoOptimizers, "16-mixed")]),
    ],
)
def test_manual_steps_follow_mixed_precision(make: Make, precision: str) -> None:
    def options() -> dict[str, Any]:
        if precision == "bf16-mixed":
            return {"precision": precision}
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}

    strategy = {"num_microbatches": 1}  # sums over microbatches round in half precision
    found, expected = fit(make, 3, strategy, **options()), fit(make, 1, **options())
    assert_same_run(found, expected, rtol=1e-3, weights_rtol=1e-2, weights_atol=1e-3)
    scalers = [getattr(run.trainer.precision_plugin, "scaler", None) for run in (found, expected)]
    assert scalers[0] is None or scalers[0].state_dict() == scalers[1].state_dict()


class TwoOnBlocks(Manual):
    def configure_optimizers(self) -> Any:
        blocks = self.net.blocks
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (blocks[:2], blocks[2:])]


class LBFGS(Manual):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Several(Manual):
    """Calls the blocks several times before it goes back; ``losses`` says how."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        return [self.loss(batch) + self.loss(-batch)]

    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        losses = self.losses(batch)
        for loss in losses:
            self.manual_backward(loss, retain_graph=True)
        optimizer.step()
        return {"loss": torch.stack([loss.detach() for loss in losses]).sum()}


class Contrastive(Several):
    """Two views of one batch, against each other."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        one, other = (F.normalize(self.encoded(view), dim=1) for view in (batch, batch.flip(1)))
        return [F.cross_entropy(one @ other.T / 0.1, torch.arange(len(batch), device=self.device))]

    def encoded(self, batch: Tensor) -> Tensor:
        return functools.reduce(lambda h, block: block(h), self.net.blocks, self.net.embed(batch))


class Chained(Several):
    """The blocks on what the blocks have made, and both in the loss."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        hidden = self.net.embed(batch)
        made = []
        for _ in range(3):
            for block in self.net.blocks:
                hidden = block(hidden)
            hidden = 0.5 * hidden + self.net.embed(batch)
            made.append(self.net.head(hidden))
        return [sum(F.mse_loss(each, batch.pow(2).sum(1, keepdim=True)) for each in made)]  # type: ignore[list-item]


class Preferring(Several):
    """A policy on two answers, and a frozen reference beside it, as in direct preference optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = Net(blocks=2).requires_grad_(False)

    def losses(self, batch: Tensor) -> list[Tensor]:
        chosen, rejected = batch + 0.5, batch - 0.5
        with torch.no_grad():
            before = self.reference(chosen) - self.reference(rejected)
            held = self.net(chosen)
        margin = self.net(chosen) - self.net(rejected) - before
        return [-F.logsigmoid(0.5 * margin).mean() + 0.01 * held.mean()]


class InTurn(Several):
    """Goes back through each call by itself, the first one last."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        return [self.loss(batch * factor) for factor in (1, 2, 3)][::-1]


class InOrder(InTurn):
    """Goes back through the first one first."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        return super().losses(batch)[::-1]


class Sometimes(Several):
    """Calls them twice in some batches only, and drops what one call gave."""

    def losses(self, batch: Tensor) -> list[Tensor]:
        first = self.loss(batch)
        if batch[0, 0] > 0:
            self.loss(batch * 3)
            return [first + self.loss(batch * 2)]
        return [first]


SEVERAL = [Chained, InTurn, Sometimes]
SLOW = [pytest.param(each, marks=pytest.mark.slow) for each in (Several, Contrastive, Preferring, InOrder)]


@pytest.mark.parametrize("make", [*SEVERAL, *SLOW])
def test_several_calls_before_a_backward_are_those_of_one_process(make: Make) -> None:
    assert_same_run(*both(make))


def test_a_lost_worker_is_replaced_between_several_calls() -> None:
    with Injector(Kill(At(Phase.TRAINING, nth=5), who=2)) as injector:
        found = fit(Chained, 5, {"num_microbatches": 4, "replicas": 2}, callbacks=[StageRecovery(spares=1)])
    assert [each.done for each in injector.report] == [True]
    assert_same_run(found, fit(Chained, 1))


class BackwardTwice(Manual):
    def training_step(self, batch: Tensor, index: int) -> Any:
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)


class Penalised(Manual):
    def training_step(self, batch: Tensor, index: int) -> Any:
        batch = batch.clone().requires_grad_()
        [gradient] = torch.autograd.grad(self.net(batch).sum(), batch, create_graph=True)
        self.manual_backward(gradient.norm())


class Later(Manual):
    kept: Any = None

    def training_step(self, batch: Tensor, index: int) -> Any:
        if self.kept is not None:
            self.manual_backward(self.kept)
        self.kept = self.loss(batch)


class StepsBetween(Manual):
    def training_step(self, batch: Tensor, index: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        optimizer.step()
        self.manual_backward(loss)


class FailsBetween(Manual):
    def training_step(self, batch: Tensor, index: int) -> Any:
        self.loss(batch)
        raise ValueError("the user's own")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (TwoOnBlocks, "2 of the 2 optimizers step parameters of the blocks"),
        (LBFGS, "LBFGS"),
        (BackwardTwice, "added already"),
        (Penalised, "single gradients of what the model has computed"),
        (Later, "end of training_step"),
        (StepsBetween, r"for optimizer.step\(\)"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_what_cannot_be_done_is_refused(make: Make, says: str) -> None:
    with pytest.raises(SkipPipeError, match=says):
        fit(make, 3, LAYOUTS[0])


def test_a_failure_between_forward_and_backward_leaves_a_whole_model() -> None:
    modules: list[FailsBetween] = []

    def make() -> LightningModule:
        modules.append(FailsBetween())
        return modules[-1]

    with pytest.raises(ValueError, match="the user's own"):
        fit(make, 3, LAYOUTS[0])
    module = modules[-1]
    module.loss(DATA).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("settings", "says"), [({"drivers": 2}, "drivers=2"), ({"microbatches": "batch"}, "microbatches=")], ids=str
)
def test_settings_that_manual_steps_cannot_have_are_refused(settings: dict[str, Any], says: str) -> None:
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), callbacks=[])
    with pytest.raises(SkipPipeError, match=says):
        check_fit(Manual(), trainer, SkipPipeStrategy(**settings).settings)


@pytest.mark.parametrize("make", [Manual, TwoOptimizers], ids=lambda make: make.__name__)
def test_a_manual_step_can_be_checked(make: Make) -> None:
    strategy = trainer_for(3, LAYOUTS[0]).strategy
    assert isinstance(strategy, SkipPipeStrategy)
    agreement = strategy.check(make(), DATA[:8])
    assert agreement.num_weights == len(list(make().parameters()))


@pytest.mark.parametrize(
    ("make", "phase"),
    [
        pytest.param(Accumulating, Phase.TRAINING, marks=pytest.mark.slow),
        (Gan, Phase.MERGING),
        pytest.param(Accumulating, Phase.MERGING, marks=pytest.mark.slow),
        pytest.param(Gan, Phase.TRAINING, marks=pytest.mark.slow),
        *(pytest.param(make, Phase.STEPPING, marks=pytest.mark.slow) for make in (Accumulating, Gan)),
    ],
)
def test_a_lost_worker_is_replaced_under_manual_steps(make: Make, phase: Phase) -> None:
    recovery = StageRecovery(spares=1)
    with Injector(Kill(At(phase, nth=2), who=2)) as injector:
        found = fit(make, 5, {"num_microbatches": 4, "replicas": 2}, callbacks=[recovery])
    assert [each.done for each in injector.report] == [True]
    assert_same_run(found, fit(make, 1))
