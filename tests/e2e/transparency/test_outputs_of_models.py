"""What a model returns to a loop that computes the loss: outputs that autograd has saved, and outputs nobody uses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.e2e.loops import Classifier, accelerator
from tests.grids import all_slow_but

from .plain_loops import BATCHES, assert_same, run

OTHERS: list[dict[str, Any]] = [{"num_microbatches": 4}, {"num_microbatches": 1}, {"microbatches": "stack"}]


class Ending(Classifier):
    """Ends in a function that saves its result for its backward."""

    def __init__(self, end: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.end = end
        self.other = nn.Linear(16, 4)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.embedding(inputs)[:, None].expand(-1, 3, -1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.end(self, hidden.mean(1))


def both(model: Any, hidden: Tensor) -> Any:
    return model.head(hidden), model.other(hidden)


ENDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "sigmoid": lambda model, hidden: model.head(hidden).sigmoid(),
    "softmax": lambda model, hidden: model.head(hidden).softmax(-1),
    "relu": lambda model, hidden: model.head(hidden).relu(),
    "exp in a dict": lambda model, hidden: {"first": (model.head(hidden) / 9).exp(), "second": hidden.tanh()},
    "what another is made of": lambda model, hidden: (model.head(hidden.tanh()), hidden.tanh(), hidden),
}


def tensors_of(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)


def squared(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for inputs, labels in BATCHES:
        outputs = tensors_of(model(inputs))
        loss = sum((each - functional.one_hot(labels, each.shape[-1])).square().mean() for each in outputs)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", all_slow_but(OTHERS, *OTHERS[::2]), ids=str)
@pytest.mark.parametrize("end", all_slow_but(ENDS, "sigmoid", "relu", "what another is made of"))
def test_outputs_that_autograd_has_saved(end: str, settings: dict[str, Any]) -> None:
    assert_same(squared, make=lambda: Ending(ENDS[end]), **settings)


def test_outputs_that_autograd_has_saved_under_accelerate() -> None:
    def train(kind: str) -> list[float]:
        torch.manual_seed(0)
        with accelerator(kind) as accelerate:
            model = Ending(ENDS["sigmoid"])
            model, optimizer = accelerate.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
            losses = []
            for inputs, labels in BATCHES:
                loss = functional.binary_cross_entropy(model(inputs), functional.one_hot(labels, 4).float())
                accelerate.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

    assert train("pipeline") == pytest.approx(train("plain"), rel=1e-5)


@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_outputs_may_be_changed_in_place(settings: dict[str, Any]) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for inputs, labels in BATCHES:
            logits = model(inputs)
            logits[torch.arange(len(labels)), labels] -= 0.3
            loss = functional.cross_entropy(logits.mul_(2), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert_same(loop, **settings)


@pytest.mark.parametrize("piped", [False, True])
def test_what_autograd_has_saved_and_the_loop_changes_is_the_error_of_one_process(piped: bool) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        for inputs, _ in BATCHES:
            model(inputs).mul_(2).sum().backward()
        return []

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(loop, piped, make=lambda: Ending(ENDS["sigmoid"]), **({"num_microbatches": 1} if piped else {}))


# ------------------------------------------------------------------------ outputs that nobody uses


def in_turns(model: Any, optimizer: torch.optim.Optimizer, which: Callable[[int], int]) -> list[float]:
    seen = []
    for index, (inputs, labels) in enumerate(BATCHES):
        loss = functional.cross_entropy(model(inputs)[which(index)], labels)
        loss.backward()
        seen += [float(model.head.weight.grad is None), float(model.other.weight.grad is None), loss.item()]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("settings", all_slow_but(OTHERS, *OTHERS[::2]), ids=str)
@pytest.mark.parametrize("which", [lambda index: 0, lambda index: index % 2], ids=["first", "in turns"])
def test_a_head_that_the_loss_does_not_use_has_no_gradient(
    which: Callable[[int], int], settings: dict[str, Any]
) -> None:
    def decaying(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)

    assert_same(partial(in_turns, which=which), make=lambda: Ending(both), optimizer=decaying, **settings)


def test_blocks_that_the_loss_does_not_use_have_no_gradient() -> None:
    """What it uses was computed before them."""

    class Early(Ending):
        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
            return super().forward(inputs), self.embedding(inputs)

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for index, (inputs, labels) in enumerate(BATCHES):
            loss = functional.cross_entropy(model(inputs)[index % 2], labels)
            loss.backward()
            seen += [
                loss.item(),
                float(model.head.weight.grad is None),
                float(model.blocks[1].mlp[0].weight.grad is None),
            ]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    assert_same(loop, make=lambda: Early(lambda model, hidden: model.head(hidden)))
