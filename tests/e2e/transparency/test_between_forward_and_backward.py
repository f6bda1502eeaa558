"""What a loop does between its call of the model and its backward: zeroing, reading and adding to gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from skippipe_plugin import SkipPipeError
from skippipe_plugin.accelerate import SkipPipeAccelerator
from tests.e2e.loops import Classifier, accelerator
from tests.grids import slow

from .plain_loops import BATCHES, assert_same, run

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


@pytest.mark.parametrize("every", [slow(1), 2])
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


# ------------------------------------------------------------------------ what needs the workers meanwhile

NEEDS: dict[str, tuple[Callable[..., Any], str]] = {
    "state_dict": (lambda model, optimizer, inputs: model.state_dict(), r"for state_dict\(\)"),
    "load": (lambda model, optimizer, inputs: model.load_state_dict(model.state_dict()), r"for state_dict\(\)"),
    "step": (lambda model, optimizer, inputs: optimizer.step(), r"for optimizer\.step\(\)"),
    "weights": (lambda model, optimizer, inputs: model.blocks[1].norm1.weight.sum(), "in a loop of your own before it"),
}


def test_evaluation_between_them() -> None:
    """The blocks run once more, when the gradients are there."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for inputs, labels in BATCHES:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model.train()(inputs), labels)
            with torch.no_grad():
                seen.append(float(model.eval()(inputs).square().mean()))
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    assert_same(loop)


@pytest.mark.parametrize("need", NEEDS)
def test_what_needs_the_workers_is_named_and_exact_elsewhere(need: str) -> None:
    ask, message = NEEDS[need]

    def loop(model: Any, optimizer: torch.optim.Optimizer, where: str) -> list[float]:
        losses = []
        for inputs, labels in BATCHES:
            optimizer.zero_grad()
            if where == "before":
                ask(model, optimizer, inputs)
            loss = functional.cross_entropy(model.train()(inputs), labels)
            if where == "between":
                ask(model, optimizer, inputs)
            loss.backward()
            if where == "after":
                ask(model, optimizer, inputs)
            optimizer.step()
            losses.append(loss.item())
        return losses

    before = partial(loop, where="before")
    with pytest.raises(SkipPipeError, match=message):
        run(lambda model, optimizer: before(model, optimizer) + loop(model, optimizer, "between"), True)
    assert_same(before)
    if need != "step":
        assert_same(partial(loop, where="after"))
