"""What a loop computes around its model, with gradients: in front of it, and past its blocks."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from skippipe_plugin import SkipPipeConfig, SkipPipeError, TorchPipeline
from tests.e2e.loops import Classifier, accelerator
from tests.e2e.support import DEVICE
from tests.grids import all_slow_but, slow

from .plain_loops import BATCHES, assert_same, run

OTHERS: list[dict[str, Any]] = [{"num_microbatches": 4}, {"num_microbatches": 1}, {"microbatches": "stack"}]


class Front(nn.Module):
    """A classifier, and what a loop puts in front of it; the loop calls ``model`` of it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.model = Classifier()


def trained(
    loss_of: Callable[[Front, Tensor, Tensor], Tensor], piped: bool, every: int = 1, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    both = Front().to(DEVICE)
    optimizers = [torch.optim.SGD(both.encoder.parameters(), lr=0.2), torch.optim.SGD(both.model.parameters(), lr=0.3)]
    config = SkipPipeConfig(**{"num_stages": 2, "num_microbatches": 4, "verbose": False, **settings})
    losses = []
    with TorchPipeline(both.model, optimizers[1], config) if piped else contextlib.nullcontext() as pipeline:
        both.__dict__["run"] = pipeline.run if pipeline is not None else lambda function, *args: function(*args)
        for index, (inputs, labels) in enumerate(BATCHES):
            loss = loss_of(both, inputs, labels)
            (loss / every).backward()
            losses.append(loss.item())
            if index % every == every - 1:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    return losses, {name: weight.detach().clone() for name, weight in both.state_dict().items()}


def in_front(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(both.model(both.encoder(inputs)), labels)


def also_in_the_loss(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    code = both.encoder(inputs)
    return functional.cross_entropy(both.model(code), labels) + code.square().mean() + code.exp().mean()


def loss_inside(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = both.run(lambda x, y: functional.cross_entropy(both.model(x), y), both.encoder(inputs), labels)
    return loss


def loss_inside_and_outside(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    code = both.encoder(inputs)
    return both.model(code, labels=labels)["loss"] + code.square().mean()  # type: ignore[no-any-return]


def by_name(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(both.model(inputs=both.encoder(inputs)), labels)


LOSSES = [in_front, also_in_the_loss, loss_inside, loss_inside_and_outside, by_name]


@pytest.mark.parametrize("settings", all_slow_but(OTHERS, *OTHERS[::2]), ids=str)
@pytest.mark.parametrize(
    "loss_of", all_slow_but(LOSSES, loss_inside_and_outside, by_name), ids=lambda loss: loss.__name__
)
def test_what_is_trained_in_front_of_the_model(loss_of: Any, settings: dict[str, Any]) -> None:
    for every in (1, 2):
        (found, weights), (expected, others) = trained(loss_of, True, every, **settings), trained(loss_of, False, every)
        assert found == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_what_has_entered_must_stay_until_the_backward(settings: dict[str, Any]) -> None:
    """It is an error of torch in one process, whose autograd has saved it."""

    def loss_of(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        code = both.encoder(inputs) * 1
        made = both.model(code)
        return functional.cross_entropy(made, labels) + code.mul_(2.0).square().mean()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        trained(loss_of, False)
    with pytest.raises(SkipPipeError, match="was changed in place before the backward"):
        trained(loss_of, True, **settings)


def test_two_pipelines_one_behind_the_other() -> None:
    class Wide(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 8)

    def train(piped: bool, first: int) -> list[float]:
        torch.manual_seed(0)
        models = [Wide().to(DEVICE), Classifier().to(DEVICE)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.2) for model in models]
        config = SkipPipeConfig(num_stages=1, num_microbatches=2, verbose=False)
        losses = []
        with contextlib.ExitStack() as stack:
            for index in (first, 1 - first) if piped else ():
                stack.enter_context(TorchPipeline(models[index], optimizers[index], config))
            for inputs, labels in BATCHES:
                loss = functional.cross_entropy(models[1](models[0](inputs)), labels)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    expected = train(False, 0)
    assert train(True, 0) == pytest.approx(expected, rel=1e-5)
    assert train(True, 1) == pytest.approx(expected, rel=1e-5)


def test_in_front_under_accelerate() -> None:
    def train(kind: str) -> list[float]:
        torch.manual_seed(0)
        with accelerator(kind) as accelerate:
            both = Front().to(DEVICE)
            made = torch.optim.SGD([*both.encoder.parameters(), *both.model.parameters()], lr=0.3)
            model, optimizer = accelerate.prepare(both.model, made)
            seen = []
            for inputs, labels in BATCHES:
                loss = functional.cross_entropy(model(both.encoder(inputs)), labels)
                accelerate.backward(loss)
                members = [*both.encoder.parameters(), *model.parameters()]
                seen += [loss.item(), float(accelerate.clip_grad_norm_(members, 0.5))]
                optimizer.step()
                optimizer.zero_grad()
            return seen

    assert train("pipeline") == pytest.approx(train("plain"), rel=1e-4)


@pytest.mark.parametrize("inside", [False, True])
def test_gradients_of_inputs(inside: bool) -> None:
    """They are scaled with the loss, and add up."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for inputs, labels in BATCHES:
            leaf = inputs.clone().requires_grad_()
            leaf.grad = torch.ones_like(leaf)
            loss = model(leaf, labels=labels)["loss"] if inside else functional.cross_entropy(model(leaf), labels)
            (loss / 3).backward()
            seen.append(float(leaf.grad.square().sum()))
            optimizer.step()
            optimizer.zero_grad()
        return seen

    assert_same(loop)


class Penalised(Classifier):
    """Leaves what it computes before its blocks in an attribute."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.embedding(inputs).tanh()
        self.penalty = hidden.square().mean()
        hidden = hidden[:, None].expand(-1, 3, -1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_a_term_of_the_loss_that_was_computed_before_the_blocks(settings: dict[str, Any]) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for inputs, labels in BATCHES:
            loss = functional.cross_entropy(model(inputs), labels) + model.penalty
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert_same(loop, Penalised, **settings)


# ------------------------------------------------------------------------ single gradients

ASKS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "head": lambda model, loss, inputs: loss.backward(inputs=list(model.head.parameters())),
    "block": lambda model, loss, inputs: loss.backward(inputs=list(model.blocks[0].parameters())),
    "inputs": lambda model, loss, inputs: loss.backward(inputs=[inputs]),
    "grad": lambda model, loss, inputs: torch.autograd.grad(loss, inputs),
    "grad of the head": lambda model, loss, inputs: torch.autograd.grad(loss, list(model.head.parameters())),
}


@pytest.mark.parametrize("inside", [slow(False), True])
@pytest.mark.parametrize("ask", ASKS)
def test_single_gradients_are_refused(ask: str, inside: bool) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        inputs, labels = BATCHES[0]
        inputs = inputs.clone().requires_grad_()
        loss = model(inputs, labels=labels)["loss"] if inside else functional.cross_entropy(model(inputs), labels)
        ASKS[ask](model, loss, inputs)
        return []

    with pytest.raises(SkipPipeError, match=r"Call loss\.backward\(\) and read \.grad|in the middle of a step"):
        run(loop, True)


def test_what_the_refusal_says_is_exact_and_so_are_gradients_of_outputs() -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head"))
        for inputs, labels in BATCHES:
            logits = model(inputs.clone().requires_grad_())
            loss = functional.cross_entropy(logits, labels)
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            loss.backward()
            seen += [float(gradient.norm()), loss.item(), float(model.head.weight.grad.norm())]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    assert_same(loop)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_the_model(reentrant: bool) -> None:
    """A reentrant one goes back inside of the loop's backward."""

    def checkpointed(both: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        code = checkpoint(both.encoder, inputs.clone().requires_grad_(), use_reentrant=reentrant)
        logits = both.model(code)
        loss: Tensor = checkpoint(functional.cross_entropy, logits, labels, use_reentrant=reentrant)
        ones = torch.ones(2, 16, device=DEVICE, requires_grad=True)
        return loss + 0.1 * checkpoint(both.model.head, ones, use_reentrant=reentrant).sum()

    (found, weights), (expected, others) = trained(checkpointed, True, 2), trained(checkpointed, False, 2)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)
