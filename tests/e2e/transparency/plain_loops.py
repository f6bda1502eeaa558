"""Plain torch loops over one small model, with a pipeline and without."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from tests.e2e.loops import Classifier, samples
from tests.e2e.support import DEVICE

BATCHES = [tuple(column.to(DEVICE) for column in samples(8, seed=seed).tensors) for seed in range(4)]
Loop = Callable[[Any, torch.optim.Optimizer], list[float]]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)


def run(
    loop: Loop,
    piped: bool,
    make: Callable[[], nn.Module] = Classifier,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    **settings: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Return what the loop has seen, and the weights that it leaves."""
    torch.manual_seed(0)
    model = make().to(DEVICE)
    made = optimizer(model)
    config = SkipPipeConfig(**{"num_stages": 2, "num_microbatches": 4, "verbose": False, **settings})
    with TorchPipeline(model, made, config) if piped else contextlib.nullcontext():
        seen = loop(model, made)
    return seen, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(loop: Loop, make: Callable[[], nn.Module] = Classifier, **options: Any) -> None:
    kept = {name: options[name] for name in ("optimizer",) if name in options}
    (found, weights), (expected, others) = run(loop, True, make, **options), run(loop, False, make, **kept)
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)
