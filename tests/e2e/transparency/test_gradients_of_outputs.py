"""What a loop sees of gradients of what a model has returned: of what goes into other outputs, a part is inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skippipe_plugin import SkipPipeError
from tests.e2e.models import TanhBlock
from tests.e2e.transparency.plain_loops import BATCHES, assert_same, run
from tests.grids import slow

SETTINGS: list[Any] = [{"num_microbatches": 4}, slow({"num_microbatches": 1}), {"microbatches": "stack"}]
Outputs = dict[str, Any]  # Any: the loss may be None


class Tagger(nn.Module):
    """Returns its hidden states, what it has computed of them, and of that its loss, if there are labels."""

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(TanhBlock() for _ in range(4))
        self.halves = halves

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Outputs:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        if self.halves and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient / 2)
        logits = self.head(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "hidden": hidden}


def halved(tensor: Tensor) -> Callable[[], float]:
    tensor.register_hook(lambda gradient: gradient / 2)
    return lambda: 0.0


def kept(tensor: Tensor) -> Callable[[], float]:
    tensor.retain_grad()
    return lambda: -1.0 if tensor.grad is None else float(tensor.grad.norm())


def loop_over(look: Callable[[Outputs], Callable[[], float]], *, own_loss: bool) -> Any:
    """Return a loop that looks at gradients, and notes what it sees; the loss is its own or the model's."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for inputs, labels in BATCHES:
            classes = labels.reshape(len(inputs), -1)[:, 0].long() % 3
            outputs = model(inputs, classes if own_loss else None)
            found = look(outputs)
            loss = outputs["loss"] if own_loss else F.cross_entropy(outputs["logits"], classes)
            loss.backward()
            seen += [found(), loss.item()]
            optimizer.step()
            optimizer.zero_grad()
        return seen

    return loop


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("way", [halved, slow(kept)])
@pytest.mark.parametrize(("name", "own_loss"), [("logits", True), ("hidden", False)])
def test_those_of_what_goes_into_other_outputs_are_refused(
    name: str, own_loss: bool, way: Callable[[Tensor], Any], settings: dict[str, Any]
) -> None:
    with pytest.raises(SkipPipeError, match="stays inside of the call"):
        run(loop_over(lambda outputs: way(outputs[name]), own_loss=own_loss), True, Tagger, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_so_are_single_gradients(settings: dict[str, Any]) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        outputs = model(BATCHES[0][0])
        (gradient,) = torch.autograd.grad(outputs["logits"].sum(), outputs["hidden"], retain_graph=True)
        return [float(gradient.norm())]

    with pytest.raises(SkipPipeError, match=r"stays inside of the call|single gradients"):
        run(loop, True, Tagger, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_those_of_the_last_outputs_are_exact(settings: dict[str, Any]) -> None:
    assert_same(loop_over(lambda outputs: kept(outputs["logits"]), own_loss=False), Tagger, **settings)
    assert_same(loop_over(lambda outputs: kept(outputs["loss"]), own_loss=True), Tagger, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_ways_out_are_exact(settings: dict[str, Any]) -> None:
    def looks_at_a_copy(outputs: Outputs) -> Callable[[], float]:
        outputs["logits"] = outputs["logits"].clone()
        return halved(outputs["logits"])

    assert_same(loop_over(looks_at_a_copy, own_loss=False), Tagger, **settings)
    assert_same(loop_over(lambda _: lambda: 0.0, own_loss=True), lambda: Tagger(halves=True), **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_so_it_is_with_several_calls(settings: dict[str, Any]) -> None:
    def loop(name: str) -> Any:
        def run_loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
            seen = []
            for inputs, labels in BATCHES:
                classes = labels.reshape(len(inputs), -1)[:, 0].long() % 3
                first, second = model(inputs[::2]), model(inputs[1::2])
                halved(first[name])
                loss = sum(F.cross_entropy(each["logits"], classes[at::2]) for at, each in enumerate((first, second)))
                loss.backward()
                seen.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
            return seen

        return run_loop

    assert_same(loop("logits"), Tagger, **settings)
    with pytest.raises(SkipPipeError, match="stays inside of the call"):
        run(loop("hidden"), True, Tagger, **settings)
