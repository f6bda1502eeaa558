"""Tensors beside the hidden states that carry a gradient: it comes back from every stage that used them."""

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin import SkipPipeError
from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.schedule import Action, Op, Path, Schedule, Visit, full_schedule, list_schedule
from skippipe_plugin.testing import At as moment
from skippipe_plugin.testing import Injector, Kill, Phase
from tests.e2e import loops
from tests.e2e.support import DEVICE, assert_same_run, train
from tests.e2e.test_recovery import Ready
from tests.e2e.transparency import plain_loops
from tests.grids import all_slow_but, slow

STEPS = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "gpipe": {"schedule": "gpipe"},
    "driver stage": {"driver_stage": True},
    "one microbatch": {"num_microbatches": 1},
    "stack": {"microbatches": "stack"},
}


def data(count: int = 24, *, batch_size: int = 8) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    x, labels, times = (
        torch.randn(count, 5, 4, generator=draw),
        torch.randint(0, 6, (count,), generator=draw),
        torch.rand(count, 1, generator=draw),
    )
    return DataLoader(TensorDataset(x, labels, times), batch_size=batch_size)


class AdaBlock(nn.Module):
    """A block of a diffusion transformer: its norm and its branch are modulated by the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(8, 24))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.ada(c)[:, None].chunk(3, -1)
        return h + gate * torch.tanh(self.linear(self.norm(h) * (1 + scale) + shift))


class Model(LightningModule):
    """Embeds a batch and its conditioning; tests say how the blocks are called with that."""

    block: Callable[[], nn.Module] = AdaBlock
    num_blocks = 5

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.labels, self.times = nn.Embedding(6, 8), nn.Linear(1, 8)
        self.add()
        self.blocks = nn.ModuleList([type(self).block() for _ in range(type(self).num_blocks)])

    def add(self) -> None:
        """Add what a test needs."""

    def condition(self, labels: Tensor, times: Tensor) -> Any:
        return self.labels(labels) + torch.tanh(self.times(times))

    def stack(self, h: Tensor, c: Any) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
        return h

    def end(self, h: Tensor, c: Any) -> Tensor:
        return self.head(h.mean(1))

    def forward(self, batch: Any) -> Tensor:
        x, labels, times = batch
        c = self.condition(labels, times)
        return self.end(self.stack(self.embed(x), c), c)

    def training_step(self, batch: Any, index: int) -> Any:
        return F.mse_loss(self(batch), batch[0].pow(2).mean((1, 2))[:, None])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Weight decay and momentum tell a gradient of zero from none.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def made(**members: Any) -> Callable[[], Model]:
    members = {name: staticmethod(each) if name == "block" else each for name, each in members.items()}
    return type("Made", (Model,), members)


def fit(make: Callable[[], Any], options: dict[str, Any] | None = None, devices: int = 3, **trainer: Any) -> Any:
    settings = {"num_microbatches": 2, "verbose": False, **(options or {})}
    return train(make, data(), devices, settings, **{"max_steps": STEPS, **trainer})


def assert_exact(
    make: Callable[[], Any], options: dict[str, Any] | None = None, devices: int = 3, **trainer: Any
) -> None:
    alone = train(make, data(), 1, **{"max_steps": STEPS, **trainer})
    assert_same_run(fit(make, options, devices, **trainer), alone)


# How it is run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_conditioning_of_every_block(options: dict[str, Any]) -> None:
    assert_exact(Model, options)


def test_the_batch_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(Model)
    assert "whole batch" not in caplog.text


def test_one_layout_rounds_alike() -> None:
    """Whoever sends its part first: parts are added along the path."""
    settings = {"num_microbatches": 4, "schedule": "gpipe"}
    one, other = fit(Model, settings, 4), fit(Model, settings, 4)
    assert one.losses == other.losses
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


def split_backward(schedule: Schedule) -> Schedule:
    """Let the input gradients (I) of the workers come first, and the weights' (W) at the end."""
    orders = []
    for order in schedule.orders:
        halves = [Action(a.stage, Op.I, a.microbatch) if a.op is Op.B and a.stage else a for a in order]
        orders.append((*halves, *(Action(a.stage, Op.W, a.microbatch) for a in halves if a.op is Op.I)))
    return dataclasses.replace(schedule, orders=tuple(orders))


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_backwards_in_halves(name: str) -> None:
    schedule = split_backward(full_schedule(name, num_stages=3, num_microbatches=4))
    assert_exact(Model, {"schedule": schedule, "num_microbatches": 4}, devices=4)


@pytest.mark.parametrize("devices", [2, 4])
def test_other_numbers_of_workers(devices: int) -> None:
    assert_exact(Model, {"num_microbatches": 4}, devices)


@pytest.mark.parametrize("microbatches", ["auto", "stack"])
def test_gradient_accumulation(microbatches: str) -> None:
    assert_exact(Model, {"microbatches": microbatches}, accumulate_grad_batches=3, max_steps=2, gradient_clip_val=0.5)


@pytest.mark.parametrize(("num_microbatches", "rtol"), [(1, 1e-5), (2, 3e-2)])
def test_mixed_precision(num_microbatches: int, rtol: float, caplog: pytest.LogCaptureFixture) -> None:
    """Gradients of two microbatches are rounded to bfloat16 before they are added, as when they are accumulated."""
    alone = train(Model, data(), 1, max_steps=STEPS, precision="bf16-mixed")
    with caplog.at_level(logging.WARNING):
        found = fit(Model, {"num_microbatches": num_microbatches}, precision="bf16-mixed")
    assert "whole batch" not in caplog.text
    assert_same_run(found, alone, rtol=rtol, weights_rtol=10 * rtol, weights_atol=0.1 * rtol)


@pytest.mark.parametrize("action", ["", slow("0B0")])
def test_a_lost_worker(action: str) -> None:
    """Also in the middle of a step, which begins again: what was sent of it before counts nothing."""
    recovery = StageRecovery()
    with Injector(Kill(moment(Phase.TRAINING, nth=2, action=action), 3)) as injector:
        found = fit(
            Model,
            {"replicas": 2, "num_microbatches": 4},
            5,
            callbacks=[recovery, Ready(recovery.policy.spares)],
            accumulate_grad_batches=3,
            max_steps=2,
        )
    assert injector.num_done == 1
    assert [event.source for event in recovery.events] == ["replica"]
    assert_same_run(found, train(Model, data(), 1, accumulate_grad_batches=3, max_steps=2))


def test_a_stage_that_is_skipped_gives_nothing_back() -> None:
    """Each path leaves one stage out; the loss of what is left is that of its blocks in one process."""
    paths = tuple(Path(0, tuple(Visit(s, s) for s in (1, 2, 3) if s != index + 1)) for index in range(2))
    placement = ((0,), (1,), (2,), (3,))
    schedule = list_schedule(placement, paths, driver_in_flight=2)

    class Skipping(Model):
        """What the paths make of the two microbatches, in one process."""

        num_blocks = 6

        def stack(self, h: Tensor, c: Any) -> Tensor:
            if hasattr(self.trainer.strategy, "worker_pids"):
                return super().stack(h, c)
            stages = [[0, 1], [2, 3], [4, 5]]
            parts = []
            for index, (part, own) in enumerate(zip(h.chunk(2), c.chunk(2), strict=True)):
                for stage, blocks in enumerate(stages):
                    for block in blocks if stage != index else ():
                        part = self.blocks[block](part, own)
                parts.append(part)
            return torch.cat(parts)

    assert_exact(Skipping, {"schedule": schedule, "num_microbatches": 2}, devices=4)


# How the blocks are called ------------------------------------------------------------------------


class Keyword(AdaBlock):
    def forward(self, h: Tensor, *, c: Any = None, gate: Any = None) -> Tensor:
        return super().forward(h, c) * (1 if gate is None else gate)


def gated(self: Model, h: Tensor, c: Any) -> Tensor:
    for block in self.blocks:
        h = block(h, c=c, gate=self.gate)
    return h


def add_gate(self: Model) -> None:
    self.gate = nn.Parameter(torch.tensor(0.9))


def add_table(self: Model) -> None:
    self.table = nn.Parameter(torch.randn(5, 8) * 0.1)


def sliced(self: Model, h: Tensor, c: Any) -> Tensor:
    for index, block in enumerate(self.blocks):
        h = block(h, c + self.table[index])
    return h


def some(self: Model, h: Tensor, c: Any) -> Tensor:
    for index, block in enumerate(self.blocks):
        h = block(h, c=c if index % 3 == 1 else c.detach())
    return h


def also_in_the_head(self: Model, h: Tensor, c: Any) -> Tensor:
    return self.head(h.mean(1) * (1 + c))


@dataclasses.dataclass
class Given:
    c: Tensor
    scale: float = 1.0


class Holding(AdaBlock):
    def forward(self, h: Tensor, given: Any) -> Tensor:
        return super().forward(h, given["c"] if isinstance(given, dict) else given.c)


class Functional(AdaBlock):
    def forward(self, h: Tensor, given: Any) -> Tensor:
        return super().forward(h, given())


def held(hold: Callable[[Tensor], Any]) -> Callable[[], Model]:
    return made(block=Holding, condition=lambda self, *given: hold(Model.condition(self, *given)))


class Checkpointed(AdaBlock):
    reentrant = False

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return checkpoint(super().forward, h, c, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Deaf(AdaBlock):
    """Does not use what it is given."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, torch.zeros_like(h[:, 0]))


class FromHost(AdaBlock):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, c.to(h.device))


class Prompted(AdaBlock):
    """Attends to a prompt that all samples share."""

    def forward(self, h: Tensor, prompt: Tensor) -> Tensor:
        weights = torch.softmax(h @ prompt.mT, -1)
        return super().forward(h, (weights @ prompt).mean(1))


def frozen(self: Model) -> None:
    self.embed.requires_grad_(False)
    self.head.requires_grad_(False)


def frozen_blocks() -> nn.Module:
    return AdaBlock().requires_grad_(False)


def as_first(self: Model, h: Tensor, c: Any) -> Tensor:
    first = h
    for block in self.blocks:
        h = block(h, first.mean(1)) if block is not self.blocks[0] else block(h, c)
    return h


class Twice(AdaBlock):
    def forward(self, h: Tensor, first: Tensor) -> Tensor:
        return super().forward(h, first.mean(1))


def from_one_embedding(self: Model, batch: Any) -> Tensor:
    """Conditioning and hidden states from one tensor, whose graph takes one backward."""
    both = torch.tanh(self.embed(batch[0]))
    return self.end(self.stack(both * 2, torch.exp(both.mean(1))), None)


CALLED: dict[str, Callable[[], Model]] = {
    "by keyword, with a learned gate": made(block=Keyword, stack=gated, add=add_gate),
    "with a slice of a table for each block": made(stack=sliced, add=add_table),
    "some with it, some without": made(block=Keyword, stack=some),
    "also in the head": made(end=also_in_the_head),
    "in a dict": held(lambda c: {"c": c, "n": 3}),
    "in a namespace": held(lambda c: SimpleNamespace(c=c, n=[c])),
    "in a dataclass": held(Given),
    "in a closure": made(
        block=Functional, condition=lambda self, *given: partial(torch.tanh, Model.condition(self, *given))
    ),
    "under a checkpoint": made(block=Checkpointed),
    "under a reentrant checkpoint": made(block=Reentrant),
    "without using it": made(block=Deaf),
    "with a prompt that all samples share": made(
        block=Prompted, add=add_table, condition=lambda self, *_: self.table * 2
    ),
    "with a parameter itself": made(block=Prompted, add=add_table, condition=lambda self, *_: self.table),
    "from the host": made(block=FromHost, condition=lambda self, *given: Model.condition(self, *given).cpu()),
    "around frozen parts": made(add=frozen),
    "with frozen blocks": made(add=frozen, block=frozen_blocks),
    "what entered the first block": made(block=Twice, stack=lambda self, h, c: Model.stack(self, h, h)),
    "from one embedding": made(forward=from_one_embedding),
}


@pytest.mark.parametrize(
    "name",
    all_slow_but(
        CALLED,
        "by keyword, with a learned gate",
        "some with it, some without",
        "in a namespace",
        "in a closure",
        "under a checkpoint",
        "with a prompt that all samples share",
        "from the host",
        "with frozen blocks",
        "what entered the first block",
    ),
)
def test_ways_to_call(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_exact(CALLED[name])
    assert "whole batch" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLED)
def test_ways_to_call_of_a_step_that_runs_once(name: str) -> None:
    assert_exact(CALLED[name], {"microbatches": "stack", "driver_stage": True})


class FirstInPlace(Twice):
    def forward(self, h: Tensor, first: Tensor) -> Tensor:
        return super().forward(F.relu(h, inplace=True), first)


def test_what_entered_the_first_block_which_changes_it() -> None:
    """The stages behind it would not see that."""
    with pytest.raises(SkipPipeError, match=r"blocks\.1 gets the tensor that entered the first block .*x\.clone"):
        fit(made(block=FirstInPlace, stack=lambda self, h, c: Model.stack(self, h, h)))
    assert_exact(made(block=FirstInPlace, stack=lambda self, h, c: Model.stack(self, h.clone(), h)))


def test_steps_without_gradients() -> None:
    """Sampling in a hook, validation, and a teacher's pass through the same blocks."""

    class Sampling(Model):
        def training_step(self, batch: Any, index: int) -> Any:
            loss = super().training_step(batch, index)
            self.log("seen", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("valid", F.mse_loss(self(batch), batch[0].sum((1, 2))[:, None]))

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.log("sampled", self([each.to(self.device) for each in next(iter(data()))]).mean())

    found, alone = (
        train(Sampling, data(), devices, settings, max_steps=STEPS, val_data=data())
        for devices, settings in ((3, {"num_microbatches": 2, "verbose": False}), (1, None))
    )
    assert_same_run(found, alone)
    for name, value in alone.trainer.callback_metrics.items():
        torch.testing.assert_close(found.trainer.callback_metrics[name], value)


# Hooks on gradients -------------------------------------------------------------------------------


def hooked(self: Model, labels: Tensor, times: Tensor) -> Tensor:
    c = Model.condition(self, labels, times)
    if c.requires_grad:
        c.register_hook(lambda gradient: gradient / (1e-2 + gradient.norm()))
    return c


class Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor) -> Tensor:
        return c.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (1e-2 + gradient.norm())


class NormalisedInside(AdaBlock):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, Normalised.apply(c))


def normed(self: Model, h: Tensor, c: Any) -> Tensor:
    return Model.end(self, F.layer_norm(h, (8,)), c)


@pytest.mark.parametrize(
    ("member", "why"),
    [
        ({"condition": hooked}, "does not follow"),
        ({"condition": hooked, "end": normed}, "does not follow"),
        ({"block": NormalisedInside}, "a block"),
    ],
)
def test_what_is_computed_over_samples_on_the_way_back(
    member: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert_exact(made(**member))
    assert why in caplog.text


def clamped(self: Model, labels: Tensor, times: Tensor) -> Tensor:
    c = Model.condition(self, labels, times)
    if c.requires_grad:
        c.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return c


def test_a_hook_that_bends_each_samples_gradient() -> None:
    assert_exact(made(condition=clamped), accumulate_grad_batches=3, max_steps=2)


def test_a_gradient_by_the_conditioning_that_the_step_computes_itself() -> None:
    def forward(self: Model, batch: Any) -> Tensor:
        c = self.condition(*batch[1:])
        out = self.end(self.stack(self.embed(batch[0]), c), c)
        (slope,) = torch.autograd.grad(out.sum(), c, create_graph=True)
        return out + slope.pow(2).sum()

    with pytest.raises(SkipPipeError, match=r"torch\.autograd\.grad\(\) asks inside of the step"):
        fit(made(forward=forward))


def test_a_first_step_that_is_compared() -> None:
    fit(Model, {"verify": "first"})


@pytest.mark.parametrize("options", [{}, {"microbatches": "stack"}])
def test_a_hook_on_what_is_also_used_around_the_blocks(options: dict[str, Any]) -> None:
    with pytest.raises(SkipPipeError, match=r"has a gradient hook \(clamped.*two parts"):
        fit(made(condition=clamped, end=also_in_the_head), options)


@pytest.mark.parametrize("options", [{"num_microbatches": 1}, {"microbatches": "stack"}])
def test_a_gradient_that_is_kept(options: dict[str, Any]) -> None:
    class Keeping(Model):
        def condition(self, labels: Tensor, times: Tensor) -> Tensor:
            self.c = super().condition(labels, times)
            if self.c.requires_grad:
                self.c.retain_grad()
            return self.c

        def end(self, h: Tensor, c: Any) -> Tensor:
            return also_in_the_head(self, h, c)

        def on_after_backward(self) -> None:
            self.log("slope", self.c.grad.norm())

    found, alone = fit(Keeping, options), train(Keeping, data(), 1, max_steps=STEPS)
    assert_same_run(found, alone)
    slope = "slope"
    torch.testing.assert_close(found.trainer.callback_metrics[slope], alone.trainer.callback_metrics[slope])


# In loops -----------------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Gets a part of its conditioning from the loop, and returns its loss when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([AdaBlock() for _ in range(4)])

    def forward(self, x: Tensor, c: Tensor | None = None, labels: Tensor | None = None) -> Any:
        c = torch.tanh(self.time(x)) if c is None else torch.tanh(self.time(x)) + c
        h = self.embed(x)[:, None]
        for block in self.blocks:
            h = block(h, c)
        logits = self.head(h.mean(1) * (1 + c))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def loop_over(loss_of: Callable[..., Tensor], step: Callable[[Any, Tensor], None] = lambda _, loss: loss.backward()):
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for x, y in plain_loops.BATCHES:
            loss = loss_of(model, x, y)
            step(model, loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    return loop


def in_the_loop(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def in_the_model(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model(x, labels=y)["loss"]


@pytest.mark.parametrize("loss_of", [in_the_loop, in_the_model])
@pytest.mark.parametrize("microbatches", ["auto", "stack"])
def test_in_a_plain_loop(loss_of: Callable[..., Tensor], microbatches: str) -> None:
    plain_loops.assert_same(loop_over(loss_of), make=Conditioned, microbatches=microbatches)


@pytest.mark.parametrize("microbatches", ["auto", "stack"])
def test_conditioning_that_the_loop_computes(microbatches: str) -> None:
    """An encoder in front of the model, whose output goes into every block."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        torch.manual_seed(1)
        encoder = nn.Linear(8, 8).to(DEVICE)
        optimizer.add_param_group({"params": encoder.parameters()})

        def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(model(x, torch.tanh(encoder(x))), y)

        return [*loop_over(loss_of)(model, optimizer), *(float(each.sum()) for each in encoder.parameters())]

    plain_loops.assert_same(loop, make=Conditioned, microbatches=microbatches)


def test_in_a_loop_of_accelerate() -> None:
    losses = {}
    for kind in ("plain", "pipeline"):
        with loops.accelerator(kind) as current:
            torch.manual_seed(0)
            made_here = Conditioned().to(DEVICE)
            model, optimizer = current.prepare(made_here, torch.optim.SGD(made_here.parameters(), lr=0.3))
            loop = loop_over(in_the_loop, lambda _, loss, current=current: current.backward(loss))
            losses[kind] = loop(model, optimizer)
    assert losses["pipeline"] == pytest.approx(losses["plain"], rel=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_in_manual_optimization(num_microbatches: int) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def end(self, h: Tensor, c: Any) -> Tensor:
            return also_in_the_head(self, h, c)

        def training_step(self, batch: Any, index: int) -> Any:
            optimizer = self.optimizers()
            loss = super().training_step(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return {"loss": loss.detach()}

    assert_exact(Manual, {"num_microbatches": num_microbatches})


class Tabled(Model):
    """Each block gets a row of a table that is trained; calls the blocks between steps, too."""

    def add(self) -> None:
        self.table = nn.Parameter(0.3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
        self.sampled: list[Tensor] = []

    def stack(self, h: Tensor, c: Any) -> Tensor:
        for index, block in enumerate(self.blocks):
            h = block(h, c + self.table[index])
        return h

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        with torch.no_grad():
            c = self.table[:3]  # a view of a parameter says that it requires a gradient, here too
            h = self.embed(batch[0][:3])
            for block in self.blocks:
                h = block(h, c)
            self.sampled.append(h.clone())


def test_a_view_of_a_parameter_in_a_call_without_gradients() -> None:
    made: list[Tabled] = []

    def make() -> Tabled:
        made.append(Tabled())
        return made[-1]

    assert_exact(make)
    for one, other in zip(made[0].sampled, made[1].sampled, strict=True):
        torch.testing.assert_close(one, other)


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, row: Tensor) -> Tensor:
        return torch.tanh(self.linear(h)) + row


class Viewed(Model):
    """Blocks get views of a trained table that were made without gradients: they say that they require one."""

    block = Row

    def add(self) -> None:
        self.table = nn.Parameter(0.3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))

    def stack(self, h: Tensor, c: Any) -> Tensor:
        with torch.no_grad():
            rows = [self.table[index] for index in range(5)]
        for index, block in enumerate(self.blocks):
            h = block(h, rows[index] if index % 2 else self.table[index])
        return h + rows[0]


class Unwatched(Viewed):
    """The blocks are called without gradients, and what enters one goes around it."""

    def stack(self, h: Tensor, c: Any) -> Tensor:
        before, is_enabled = h, torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        for index, block in enumerate(self.blocks):
            h = block(h, self.table[index])
            h = h + before if index == 1 else h
        torch.set_grad_enabled(is_enabled)
        return h


@pytest.mark.parametrize("settings", all_slow_but(SETTINGS, "1f1b", "stack"))
@pytest.mark.parametrize("make", [Viewed, Unwatched])
def test_views_that_were_made_without_gradients_have_none(make: Callable[[], Model], settings: str) -> None:
    assert_exact(make, SETTINGS[settings])
