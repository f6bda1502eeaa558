"""What a loop does between its call of the model and its backward: zeroing, reading and adding to gradients."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from skippipe_plugin.accelerate import SkipPipeAccelerator
from tests.e2e.loops import Classifier, accelerator, samples

BATCHES = [samples(8, seed=seed).tensors for seed in range(4)]
Loop = Callable[[nn.Module, torch.optim.Optimizer], list[float]]


def run(loop: Loop, piped: bool, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    config = SkipPipeConfig(**{"num_stages": 2, "num_microbatches": 4, "verbose": False, **settings})
    with TorchPipeline(model, optimizer, config) if piped else contextlib.nullcontext():
        seen = loop(model, optimizer)
    return seen, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(loop: Loop, **settings: Any) -> None:
    (found, weights), (expected, others) = run(loop, True, **settings), run(loop, False)
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------ zeroing


def zeroed(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: Callable[..., None], every: int = 1
) -> list[float]:
    losses = []
    for index, (inputs, labels) in enumerate(BATCHES):
        loss = functional.cross_entropy(model(inputs), labels)
        if index % every == 0:
            zero(model, optimizer)
        loss.backward()
        if index % every == every - 1:
            optimizer.step()
        losses.append(loss.item())
    return losses


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = None


ZEROES: dict[str, Callable[..., None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "fill": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by hand": by_hand,
    "twice": lambda model, optimizer: (optimizer.zero_grad(), model.zero_grad(set_to_none=False)),
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("zero", ZEROES)
def test_zeroing_between_forward_and_backward(zero: str, every: int) -> None:
    assert_same(partial(zeroed, zero=ZEROES[zero], every=every))


@pytest.mark.parametrize(
    "settings",
    [{"num_microbatches": 1}, {"microbatches": "stack"}, {"driver_stage": True, "num_stages": 3}],
    ids=lambda settings: ", ".join(settings),
)
def test_zeroing_in_other_pipelines(settings: dict[str, Any]) -> None:
    assert_same(partial(zeroed, zero=ZEROES["optimizer"]), **settings)


@pytest.mark.parametrize("steps", [1, 2])
def test_zeroing_under_accelerate(steps: int) -> None:
    """With clipping, and with accumulation, where accelerate's optimizer zeroes only when it has stepped."""

    def train(kind: str) -> list[float]:
        torch.manual_seed(0)
        with accelerator(kind, gradient_accumulation_steps=steps) as accelerate:
            model = Classifier()
            made = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
            prepared, optimizer = accelerate.prepare(model, made)
            seen = []
            for inputs, labels in BATCHES:
                with accelerate.accumulate(prepared):
                    loss = functional.cross_entropy(prepared(inputs), labels)
                    optimizer.zero_grad()
                    accelerate.backward(loss)
                    if accelerate.sync_gradients:
                        seen.append(float(accelerate.clip_grad_norm_(prepared.parameters(), 0.5)))
                    optimizer.step()
                seen.append(loss.item())
            if isinstance(accelerate, SkipPipeAccelerator):
                accelerate.end_training()
            return seen

    assert train("pipeline") == pytest.approx(train("plain"), rel=1e-4)


# ------------------------------------------------------------------------ gradients seen meanwhile


def test_gradients_outside_of_the_blocks_are_there_meanwhile() -> None:
    """They are read, written and added to while the step waits."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for index, (inputs, labels) in enumerate(BATCHES):
            loss = functional.cross_entropy(model(inputs), labels)
            seen.append(0.0 if model.head.weight.grad is None else float(model.head.weight.grad.norm()))
            model.head.bias.grad = None
            (0.1 * model.embedding.weight.square().sum()).backward()
            (loss + 0.1 * model.head.weight.square().sum()).backward()
            seen += [loss.item(), float(model.embedding.weight.grad.norm()), float(model.head.weight.grad.norm())]
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
        return seen

    assert_same(loop)


def test_hooks_on_gradients_see_the_whole_backward() -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen: list[float] = []
        model.head.weight.register_hook(lambda gradient: seen.append(float(gradient.norm())))
        for inputs, labels in BATCHES:
            loss = functional.cross_entropy(model(inputs), labels) + 0.1 * model.head.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return seen

    assert_same(loop)
