"""What a model leaves beside what it returns (in an attribute, in a list, by a hook) and the loop's loss uses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skippipe_plugin import SkipPipeError
from tests.e2e.loops import Classifier
from tests.grids import all_slow_but

from .plain_loops import BATCHES, assert_same, run


def left_by(what: str) -> Callable[[], nn.Module]:
    """Return what makes a classifier that leaves something in each call; ``model.left()`` is that of the last one."""

    def make() -> nn.Module:
        model, kept = Classifier(), []

        def keep(_: nn.Module, args: Any, made: Any = None) -> None:
            if what == "attribute":
                model.__dict__["features"] = args[0]
            else:
                kept.append(args[0] if made is None else made)

        part = model.embedding if what == "in front" else model.head
        if what in ("attribute", "before the head"):
            part.register_forward_pre_hook(keep)
        else:
            part.register_forward_hook(keep)
        model.__dict__["left"] = lambda: model.__dict__["features"] if what == "attribute" else kept.pop()
        return model

    return make


def loss_of(model: Any, inputs: Tensor, labels: Tensor, inside: bool) -> Tensor:
    loss: Tensor = model(inputs, labels=labels)["loss"] if inside else functional.cross_entropy(model(inputs), labels)
    return loss


def with_what_is_left(inside: bool) -> Callable[[Any, torch.optim.Optimizer], list[float]]:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for inputs, labels in BATCHES:
            loss = loss_of(model, inputs, labels, inside) + 0.3 * model.left().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    return loop


def left_alone(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """What the model returns is not used."""
    seen = []
    for inputs, _ in BATCHES:
        model(inputs)
        loss = model.left().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def two_calls(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    seen = []
    for inputs, labels in BATCHES:
        first = loss_of(model, inputs[:4], labels[:4], True) + model.left().mean()
        second = loss_of(model, inputs[4:], labels[4:], True) + model.left().mean()
        loss = first / 8 + second / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


WAYS = ["attribute", "before the head", "behind the head", "in front"]


@pytest.mark.parametrize("inside", [True, False], ids=["loss of the model", "loss of the loop"])
@pytest.mark.parametrize("what", all_slow_but(WAYS, "attribute", "before the head", "in front"))
def test_it_goes_back_with_the_loss(what: str, inside: bool) -> None:
    assert_same(with_what_is_left(inside), left_by(what))


@pytest.mark.parametrize("settings", [{"num_microbatches": 1}, {"microbatches": "stack"}], ids=str)
@pytest.mark.parametrize("what", ["attribute", "behind the head"])
def test_so_it_does_with_other_settings(what: str, settings: dict[str, Any]) -> None:
    assert_same(with_what_is_left(True), left_by(what), **settings)


@pytest.mark.parametrize("loop", [left_alone, two_calls], ids=lambda loop: loop.__name__)
def test_it_is_all_that_is_used_or_two_calls_leave_some(loop: Any) -> None:
    assert_same(loop, left_by("before the head"))


class Deep:
    """Holds something so deep that it is not looked into."""

    def __init__(self, depth: int = 6) -> None:
        self.next = Deep(depth - 1) if depth else None
        self.kept: Any = None

    @property
    def last(self) -> "Deep":
        return self if self.next is None else self.next.last


def left_deep() -> nn.Module:
    model, deep = Classifier(), Deep()
    model.__dict__["deep"] = deep
    model.head.register_forward_pre_hook(lambda _, args: setattr(deep.last, "kept", args[0]))
    model.__dict__["left"] = lambda: deep.last.kept
    return model


@pytest.mark.parametrize(
    ("inside", "message"), [(True, "have gone back already"), (False, "each microbatch has left its own")]
)
def test_where_that_was_not_seen_it_is_refused_and_the_way_out_is_exact(inside: bool, message: str) -> None:
    with pytest.raises(SkipPipeError, match=message):
        run(with_what_is_left(inside), True, left_deep)
    assert_same(with_what_is_left(inside), left_deep, microbatches="stack")


def test_two_backwards_of_one_call_are_refused() -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        loss_of(model, *BATCHES[0], True).backward(retain_graph=True)
        model.left().mean().backward()
        return []

    with pytest.raises(SkipPipeError, match="Use one backward for all that a call has given"):
        run(loop, True, left_by("attribute"))


def test_a_loss_of_the_model_together_with_its_outputs(caplog: pytest.LogCaptureFixture) -> None:
    """What the error names as a way out."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for inputs, labels in BATCHES:
            made = model(inputs, labels=labels)
            loss = made["loss"] + made["logits"].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    with pytest.raises(SkipPipeError, match="microbatches='stack'"):
        run(loop, True)
    assert_same(loop, microbatches="stack")


def test_what_a_loop_has_computed_with_a_buffer_before_goes_back() -> None:
    """Trying the step must not count as a write to the buffer that autograd has saved."""

    class Positions(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(3))
            self.place = nn.Embedding(3, 8)

        def placed(self, inputs: Tensor) -> Tensor:
            return inputs + self.place(self.positions).mean(0)

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for inputs, labels in BATCHES:
            loss = loss_of(model, model.placed(inputs), labels, True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    assert_same(loop, Positions)
