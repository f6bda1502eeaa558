"""A model in eval mode, called with gradients on: evaluation is that of one process, and training is refused."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from skippipe_plugin import SkipPipeError
from tests.e2e.loops import Classifier, accelerator

from .plain_loops import BATCHES, assert_same, run


class Several(Classifier):
    """Returns values with and without a gradient."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(inputs)
        with torch.no_grad():
            sure = logits.softmax(-1).amax(-1)
        return {"logits": logits, "sure": sure, "best": logits.argmax(-1), "detached": logits.detach() * 2}


def losses_of(model: Any, optimizer: Any, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    head = nn.Linear(4, 4).to(inputs.device)
    return {
        "loss outside": functional.cross_entropy(model(inputs), labels),
        "head outside": functional.cross_entropy(head(model(inputs)), labels),
        "loss inside": model(inputs, labels=labels)["loss"],
    }


@pytest.mark.parametrize("settings", [{"num_microbatches": 4}, {"num_microbatches": 1}], ids=str)
@pytest.mark.parametrize("which", ["loss outside", "head outside", "loss inside"])
def test_training_in_eval_mode_is_refused(which: str, settings: dict[str, Any]) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        model.eval()
        losses_of(model, optimizer, *BATCHES[0])[which].backward()
        return []

    with pytest.raises(SkipPipeError, match=r"returned in eval mode.*model\.train\(\)"):
        run(loop, True, **settings)


def test_it_is_under_accelerate() -> None:
    with accelerator("pipeline") as accelerate:
        model = Classifier()
        model, _ = accelerate.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        model.eval()
        with pytest.raises(SkipPipeError, match="returned in eval mode"):
            accelerate.backward(functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]))


def test_the_way_out_is_exact() -> None:
    """Dropout in the blocks is off, as in eval mode."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        model.train()
        for part in model.children():
            part.eval()
        for inputs, labels in BATCHES:
            loss = functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert_same(loop, make=lambda: Classifier(dropout=0.5))


@pytest.mark.parametrize("settings", [{"num_microbatches": 4}, {"num_microbatches": 1}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_without_no_grad(frozen: bool, settings: dict[str, Any]) -> None:
    """What needs a gradient in one process does so here, and nothing else: it can become an array."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        model.requires_grad_(not frozen)
        model.eval()
        for inputs, labels in BATCHES:
            output = model(inputs)
            seen += [float(value.requires_grad) for value in output.values()]
            with contextlib.suppress(RuntimeError):
                seen.append(float(output["logits"].cpu().numpy().sum()))
            seen += [float(output[name].cpu().numpy().sum()) for name in ("sure", "best", "detached")]
            seen.append(functional.cross_entropy(output["logits"], labels).item())
        with torch.no_grad():
            seen.append(float(model(inputs)["logits"].requires_grad))
        return seen

    def train_first(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = loop(model, optimizer)
        model.requires_grad_(True)
        model.train()
        for inputs, labels in BATCHES:
            loss = functional.cross_entropy(model(inputs)["logits"], labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    assert_same(loop if frozen else train_first, Several, **settings)
