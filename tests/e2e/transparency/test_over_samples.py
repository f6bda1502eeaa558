"""What a step computes over the samples of its batch, and what no result of made-up hidden states shows."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.accelerate import SkipPipeAccelerator, SkipPipeConfig
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.model.slopes import slopes_of
from tests.grids import all_slow_but

from ..support import assert_same_run, assert_same_weights, train

PIPELINE = {"num_microbatches": 3, "verbose": False}


def batches() -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x.pow(2).sum(1, keepdim=True)), batch_size=8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, beside: Any = None, **named: Any) -> Tensor:
        out = h + torch.tanh(self.linear(h))
        for value in (beside, getattr(self, "factor", None), *named.values()):
            if isinstance(value, dict):
                value = value["factor"]
            if isinstance(value, Tensor) and not value.is_floating_point():
                out = out + 0.1 * h[value]
            elif value is not None:
                out = out + 0.1 * h * value
        return out


class Stepping(LightningModule):
    def __init__(self, arguments: Callable[[Any, Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.arguments = arguments

    def training_step(self, batch: Any, _: int) -> Tensor:
        arguments = self.arguments(self, batch[0])
        h = functools.reduce(lambda h, block: block(h, **arguments), self.blocks, self.embed(batch[0]))
        return F.mse_loss(self.head(h), batch[1])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.01)


def set_factor(module: Any, x: Tensor) -> dict[str, Any]:
    for block in module.blocks:
        block.factor = float(x.std())
    return {}


OVER_SAMPLES: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "spread": lambda _, x: {"beside": x.std(0).repeat(2)},
    "number": lambda _, x: {"beside": float(x.abs().mean())},
    "nested": lambda _, x: {"scales": {"factor": x.abs().amax()}},
    "neighbours": lambda _, x: {"beside": torch.cdist(x, x).argsort(1)[:, 1]},
    "centred": lambda _, x: {"beside": (x - x.mean(0)).repeat(1, 2)},
    "attribute": set_factor,
}
OF_EACH_SAMPLE: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "rows": lambda _, x: {"beside": x.std(1, keepdim=True)},
    "shared": lambda _, x: {"beside": torch.linspace(0.5, 1.0, 8, device=x.device), "scale": 0.9},
    "turned": lambda _, x: {"scales": {"factor": x.abs().mean(1)[None].T}},
}


@pytest.mark.parametrize("name", OVER_SAMPLES)
def test_arguments_of_blocks_computed_over_samples_are_those_of_one_process(name: str, caplog: Any) -> None:
    make = functools.partial(Stepping, OVER_SAMPLES[name])
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, batches(), 3, PIPELINE, max_steps=4)
    assert_same_run(found, train(make, batches(), 1, max_steps=4))
    assert "is another there than for the batch, computed over samples" in caplog.text
    assert ("an attribute that the step sets" if name == "attribute" else "the blocks' argument '") in caplog.text


@pytest.mark.parametrize("name", OF_EACH_SAMPLE)
def test_arguments_that_are_each_samples_own_leave_the_batch_cut(name: str, caplog: Any) -> None:
    make = functools.partial(Stepping, OF_EACH_SAMPLE[name])
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, batches(), 3, {**PIPELINE, "microbatches": "batch"}, max_steps=4)
    assert_same_run(found, train(make, batches(), 1, max_steps=4))
    assert "runs once" not in caplog.text


def test_it_is_refused_where_the_batch_must_be_cut() -> None:
    with pytest.raises(SkipPipeError, match="argument 'beside' is another there than for the batch"):
        train(
            functools.partial(Stepping, OVER_SAMPLES["number"]),
            batches(),
            3,
            {**PIPELINE, "microbatches": "batch"},
            max_steps=4,
        )


# ------------------------------------------------------------- gradients, and what bends


class Scaled(torch.autograd.Function):
    """Gives each batch a gradient of length one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm()


class Returning(LightningModule):
    """Its loss is made by ``loss`` of what its head gives."""

    def __init__(self, loss: Callable[[Any, Tensor, Tensor], Tensor], lr: float = 0.02) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.often = nn.Embedding(3, 8, scale_grad_by_freq=True)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.loss, self.lr, self.seen = loss, lr, []

    def hidden(self, x: Tensor) -> Tensor:
        entering = self.embed(x)
        if self.loss is frequent:
            entering = entering + self.often((x[:, 0].abs() * 2).long() % 3)
        return functools.reduce(lambda h, block: block(h), self.blocks, entering)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(self, self.hidden(batch[0]), batch[1])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=self.lr)


def error(module: Any, h: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(module.head(h)[:, :1], y)


def frequent(module: Any, h: Tensor, y: Tensor) -> Tensor:
    return error(module, h, y)


def balanced(module: Any, h: Tensor, y: Tensor) -> Tensor:
    first, second = error(module, h, y), module.head(h)[:, 1:].abs().mean()
    return first + 0.5 * second * (first / second).detach()


def straight_through(module: Any, h: Tensor, y: Tensor) -> Tensor:
    spread = h.std(0).sum()
    return error(module, h, y) + spread - spread.detach()


def hooked(module: Any, h: Tensor, y: Tensor) -> Tensor:
    h.register_hook(lambda grad: grad / grad.norm())
    return error(module, h, y)


def listening(module: Any, h: Tensor, y: Tensor) -> Tensor:
    h.register_hook(lambda grad: module.seen.append(float(grad.norm())))
    return error(module, h, y)


def followed(module: Any, h: Tensor, y: Tensor) -> Tensor:
    """Ordinary: what it does on the way back it does for each sample, and its kinks are theirs or its weights'."""
    h.register_hook(lambda grad: grad.clamp(-0.02, 0.02))
    out, weight = module.head(h), module.scale.exp().clamp(max=50.0)
    rows = (out[:, :1] - y).abs().clamp(max=900.0).relu() + F.huber_loss(out[:, :1], y, reduction="none")
    rows = (
        torch.maximum(rows, out[:, 1:])
        + F.normalize(out).sum(1, keepdim=True)
        + torch.stack([sample.mean().abs() for sample in h])[:, None]
    )
    loss = weight * rows.mean() + F.cross_entropy(out, (y[:, 0] > 3).long(), label_smoothing=0.1)
    module.log("error", error(module, h, y).item())
    module.log("accuracy", (out.argmax(1) == (y[:, 0] > 3)).float().mean())
    assert torch.isfinite(loss)
    return loss / torch.ones_like(y).sum().clamp(min=1) * len(y)


def branching(module: Any, h: Tensor, y: Tensor) -> Tensor:
    loss = error(module, h, y)
    return loss * 1.5 if loss < 20.0 else loss


def branching_by_number(module: Any, h: Tensor, y: Tensor) -> Tensor:
    loss = error(module, h, y)
    return loss * 1.5 if loss.detach().item() < 20.0 else loss


GRADIENTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "balanced": balanced,
    "straight through": straight_through,
    "hook": hooked,
    "function": lambda module, h, y: error(module, Scaled.apply(h), y),
    "frequencies": frequent,
}
BENT: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "flooding": lambda module, h, y: (error(module, h, y) - 0.1).abs() + 0.1,
    "worst": lambda module, h, y: torch.maximum(error(module, h, y), module.head(h)[:, 1].pow(2).mean()),
    "worst of a list": lambda module, h, y: torch.stack([error(module, h, y), h.pow(2).mean()]).max(),
    "hinge": lambda module, h, y: F.relu(9.0 - h.mean()) + error(module, h, y),
    "of means": lambda module, h, y: h.mean(0).clamp(min=-5.0).sum() + error(module, h, y),
    "branch": branching,
    "branch by a number": branching_by_number,
}


def both(make: Callable[[], LightningModule], caplog: Any, accumulated: int = 1, **options: Any) -> None:
    fit = {"max_steps": 4, "accumulate_grad_batches": accumulated}
    with caplog.at_level(logging.WARNING, "skippipe_plugin"):
        found = train(make, batches(), 3, {**PIPELINE, **options}, **fit)
    expected = train(make, batches(), 1, **fit)
    assert_same_run(found, expected)
    assert len(found.module.seen) == len(expected.module.seen)  # type: ignore[arg-type]
    assert found.module.seen == pytest.approx(expected.module.seen, rel=1e-4)


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_that_does_not_follow_is_that_of_one_process(name: str, caplog: Any) -> None:
    both(functools.partial(Returning, GRADIENTS[name]), caplog)
    assert "the gradient of the loss of the batch does not follow from theirs" in caplog.text


def test_what_hooks_on_gradients_leave_is_that_of_one_process(caplog: Any) -> None:
    both(functools.partial(Returning, listening), caplog)
    assert "self.seen is then another" in caplog.text


@pytest.mark.parametrize("name", all_slow_but(BENT, "flooding", "worst of a list", "hinge", "branch by a number"))
def test_what_bends_by_a_value_of_all_samples_is_that_of_one_process(name: str, caplog: Any) -> None:
    both(functools.partial(Returning, BENT[name]), caplog)
    assert "of a value that all samples make together goes one way or another" in caplog.text


def test_what_bends_for_each_sample_leaves_the_batch_cut(caplog: Any) -> None:
    both(functools.partial(Returning, followed), caplog, microbatches="batch")
    assert "runs once" not in caplog.text


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad.clamp(-0.01, 0.01)


class ClampedBlock(Block):
    def forward(self, h: Tensor, beside: Any = None, **named: Any) -> Tensor:
        return Clamped.apply(super().forward(Clamped.apply(h)))  # type: ignore[no-any-return]


class Bending(Returning):
    """Large gradients are cut off in front of the blocks, in them and behind them."""

    def __init__(self) -> None:
        super().__init__(error, lr=0.1)
        self.blocks = nn.ModuleList(ClampedBlock() for _ in range(3))

    def hidden(self, x: Tensor) -> Tensor:
        entering = self.embed(x)
        entering.register_hook(lambda grad: grad.clamp(-0.004, 0.004))
        leaving = functools.reduce(lambda h, block: block(h), self.blocks, entering)
        leaving.register_hook(lambda grad: grad.clamp(-0.02, 0.02))
        return leaving


class Retaining(Bending):
    """Looks at gradients of what it has computed."""

    def hidden(self, x: Tensor) -> Tensor:
        self.leaving = super().hidden(x)
        self.leaving.retain_grad()
        return self.leaving

    def on_after_backward(self) -> None:
        assert self.leaving.grad is not None
        self.seen.append(float(self.leaving.grad.norm()))


@pytest.mark.parametrize("make", [Bending, Retaining])
def test_backwards_that_bend_see_the_gradient_of_one_of_several_batches(make: type[Bending], caplog: Any) -> None:
    both(make, caplog, accumulated=3)
    assert ("self.leaving is then another" in caplog.text) == (make is Retaining)


class Returned(nn.Module):
    """Returns its loss; large gradients are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Bending()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": error(self.inner, self.inner.hidden(x), y)}


def accelerated(accelerator: Accelerator) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Returned()
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    for x, y in [*batches()] * 2:
        with accelerator.accumulate(model):
            accelerator.backward(model(x, y)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: value.clone() for name, value in accelerator.get_state_dict(model).items()}
    accelerator.end_training()
    return weights


def test_so_they_do_in_a_loop_of_accelerate() -> None:
    config = SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False)
    found = accelerated(SkipPipeAccelerator(cpu=True, gradient_accumulation_steps=3, config=config))
    assert_same_weights(found, accelerated(Accelerator(cpu=True, gradient_accumulation_steps=3)), atol=1e-6)


def test_hooks_of_parameters_hear_of_no_gradient_that_is_only_asked_for() -> None:
    weight = nn.Parameter(torch.ones(2))
    heard: list[Tensor] = []
    weight.register_hook(heard.append)
    slopes = slopes_of((weight * 3).sum(), [], [weight])
    assert slopes is not None
    torch.testing.assert_close(slopes.weights[0], torch.full((2,), 3.0))
    assert not heard
    assert weight.grad is None
    (weight * 2).sum().backward()
    assert len(heard) == 1
