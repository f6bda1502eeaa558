"""One buffer in several blocks, or in a block and the rest of the model: exact, and one buffer still; or refused."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from skippipe_plugin.engine.errors import SkipPipeError


class Table(nn.Module):
    """A module without parameters that several blocks have."""

    def __init__(self, table: Tensor, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=persistent)
        self.writes = False

    def forward(self, h: Tensor) -> Tensor:
        if self.writes:
            self.table += 1
        return h * self.table


class Block(nn.Module):
    def __init__(self, scale: Table) -> None:
        super().__init__()
        self.norm, self.linear, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), scale

    def forward(self, h: Tensor) -> Tensor:
        return h + self.scale(torch.tanh(self.linear(self.norm(h))))


class Net(nn.Module):
    def __init__(self, scales: list[Table], outer: Table | None = None) -> None:
        super().__init__()
        self.outer, self.embed, self.head = outer, nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block(scale) for scale in scales)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if self.outer is not None:
            h = self.outer(h)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def one_object() -> Net:
    table = torch.rand(8) + 0.5
    return Net([Table(table) for _ in range(4)])


def not_persistent() -> Net:
    table = torch.rand(8) + 0.5
    return Net([Table(table, persistent=False) for _ in range(4)])


def first_and_last() -> Net:
    table = torch.rand(8) + 0.5
    return Net([Table(table), Table(torch.rand(8)), Table(torch.rand(8)), Table(table)])


def within_one_stage() -> Net:
    table = torch.rand(8) + 0.5
    return Net([Table(torch.rand(8)), Table(torch.rand(8)), Table(table), Table(table)])


def one_module() -> Net:
    return Net([Table(torch.rand(8) + 0.5)] * 4)


def with_the_model() -> Net:
    table = torch.rand(8) + 0.5
    return Net([Table(table) for _ in range(4)], Table(table))


def views_of_one_table() -> Net:
    table = torch.rand(12) + 0.5
    return Net([Table(table[i : i + 8]) for i in range(4)])


MAKERS = [one_object, not_persistent, first_and_last, within_one_stage, one_module, with_the_model, views_of_one_table]


def run(make: Callable[[], Net], pipe: bool, **settings: Any) -> tuple[list[float], Net]:
    torch.manual_seed(0)
    model, x, y = make(), torch.randn(24, 8), torch.arange(24) % 4
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), list[float]()
    config = SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False, **settings)
    with TorchPipeline(model, optimizer, config) if pipe else nullcontext():
        for step in range(4):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            table = model.blocks[3].scale.table
            if step == 1:
                table.mul_(0.5)
            elif step == 2:
                table.data.add_(0.25)  # not counted in the tensor's version
            losses += [each.scale.table.sum().item() for each in model.blocks]
    return losses, model


@pytest.mark.parametrize(
    ("make", "settings"),
    [*((make, {}) for make in MAKERS), (with_the_model, {"driver_stage": True})],
    ids=lambda value: getattr(value, "__name__", "driver_stage" if value else ""),
)
def test_a_shared_buffer_is_one_in_all_blocks(make: Callable[[], Net], settings: dict[str, Any]) -> None:
    (expected, one), (losses, model) = run(make, False), run(make, True, **settings)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == one.state_dict().keys()
    for net in (model, one):
        net.blocks[3].scale.table.add_(1)
    for ours, theirs in zip(model.buffers(), one.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def written() -> Net:
    model = one_object()
    for block in model.blocks:
        block.scale.writes = True
    return model


def test_a_block_that_writes_one_is_refused_and_the_model_stays_whole() -> None:
    made: list[Net] = []

    def make() -> Net:
        made.append(written())
        return made[-1]

    with pytest.raises(SkipPipeError, match=r"writes blocks\.\d\.scale\.table, .* a tensor of its own"):
        run(make, True)
    assert made[0](torch.randn(2, 8)).shape == (2, 4)


def test_a_buffer_of_its_own_may_be_written() -> None:
    def separate() -> Net:
        model = written()
        for block in model.blocks:
            block.scale.table = block.scale.table.clone()
        return model

    def losses(pipe: bool) -> list[float]:
        torch.manual_seed(0)
        model, x = separate(), torch.randn(8, 8)
        config = SkipPipeConfig(num_stages=2, num_microbatches=1, verbose=False)
        with TorchPipeline(model, None, config) if pipe else nullcontext():
            first = model(x).mean()
            first.backward()
        return [first.item(), *(block.scale.table.sum().item() for block in model.blocks)]

    torch.testing.assert_close(losses(True), losses(False))
