"""Hooks on the gradients of parameters on the driver: they see those of a backward, whole, and once."""

import functools
import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.e2e.support import assert_same_run, train
from tests.grids import all_slow_but

from ..modules import STEPS

WHERE = ("embed", "tied", "head", "hosted")
WHAT = ("looks", "clips", "doubles", "looks at the sum", "clips the sum")


class Model(LightningModule):
    """Calls the blocks once or twice before it goes back; a hook is on a parameter that ``where`` names."""

    def __init__(self, where: str, what: str, calls: int, manual: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.calls, self.automatic_optimization = calls, not manual
        self.seen: list[float] = []
        if where == "tied":
            self.head.weight = self.embed.weight
        part = {"embed": self.embed, "tied": self.embed, "head": self.head, "hosted": self.blocks[0][0]}[where]
        if what.endswith("the sum"):
            part.weight.register_post_accumulate_grad_hook(functools.partial(self.after, what.startswith("clips")))
        else:
            part.weight.register_hook(getattr(self, what))

    def looks(self, gradient: Tensor) -> None:
        self.seen.append(float(gradient.norm()))

    def clips(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient.norm() + 1e-3)

    def doubles(self, gradient: Tensor) -> Tensor:
        return gradient * 2

    def after(self, clips: bool, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.looks(parameter.grad)
        if clips:
            parameter.grad.div_(parameter.grad.norm() + 1e-3)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        hidden = self.embed(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden), target)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = self.loss(*batch)
        if self.calls == 2:
            loss = loss + 0.5 * self.loss(batch[0] * 0.5, batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches() -> Any:
    draw = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8 * STEPS, 8, generator=draw), torch.arange(8 * STEPS) % 8)
    return torch.utils.data.DataLoader(data, batch_size=8)


CASES = list(itertools.product(WHERE, WHAT, (1, 2), (False, True), (1, 2)))
QUICK = [
    ("embed", "clips", 2, True, 2),
    ("tied", "looks", 1, True, 1),
    ("hosted", "looks", 2, False, 2),
    ("hosted", "clips the sum", 1, True, 2),
]


@pytest.mark.parametrize(("where", "what", "calls", "manual", "num_microbatches"), all_slow_but(CASES, *QUICK))
def test_a_hook_sees_the_gradient_of_a_backward(
    where: str, what: str, calls: int, manual: bool, num_microbatches: int
) -> None:
    make = functools.partial(Model, where, what, calls, manual)
    strategy = {"num_microbatches": num_microbatches, "schedule": "gpipe", "driver_stage": True}
    expected = train(make, batches(), devices=1)
    found = train(make, batches(), devices=3, strategy=strategy)
    assert_same_run(found, expected)
    torch.testing.assert_close(found.module.seen, expected.module.seen, rtol=1e-4, atol=1e-6)
