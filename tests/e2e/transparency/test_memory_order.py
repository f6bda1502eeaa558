"""Tensors lie in memory as in one process, wherever they have been: what is drawn like them shows where they do not."""

from typing import Any

import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.grids import slow

from ..support import assert_same_run, train
from . import whole_models as models
from .test_whole import batches

WIDTH = models.WIDTH


def assert_alike(make: Any, num_microbatches: int = 4, data: Any = None, **strategy: Any) -> None:
    data = data or batches()
    plain = train(make, data, 1, max_steps=3)
    settings = {"microbatches": "stack", "num_microbatches": num_microbatches, "verbose": False, **strategy}
    assert_same_run(train(make, data, 3, settings, max_steps=3), plain)


class Noisy(models.Whole):
    """Noise like the blocks' result comes after them."""

    order: tuple[int, ...] = (0, 2, 1)
    """In memory, of what enters them."""

    def lying(self, hidden: Tensor) -> Tensor:
        places = sorted(range(3), key=self.order.__getitem__)
        return hidden.permute(self.order).contiguous().permute(places)

    def training_step(self, batch: Any) -> Tensor:
        hidden = self.run(self.lying(self.model(batch["tokens"])))
        noise = 0.1 * torch.randn_like(hidden)
        turns = torch.tensor([1.0, -1.0], device=hidden.device).repeat(hidden.numel() // 2)
        signs = turns.as_strided(hidden.shape, hidden.stride())
        return functional.cross_entropy(self.head((hidden + noise + 0.1 * signs).mean(1)), batch["y"])


class BatchSecond(Noisy):
    order = 1, 0, 2


class Backwards(Noisy):
    order = 2, 1, 0


class Sliced(Noisy):
    """What enters the blocks has gaps."""

    def lying(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, hidden], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, :4]


class Expanded(Noisy):
    def lying(self, hidden: Tensor) -> Tensor:
        return hidden.mean(1, keepdim=True).expand_as(hidden)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("make", [Noisy, BatchSecond])
def test_what_enters_and_comes_back(make: Any, num_microbatches: int) -> None:
    assert_alike(make, num_microbatches)


@pytest.mark.parametrize("make", [Backwards, Sliced, Expanded])
def test_what_enters_in_parts(make: Any) -> None:
    assert_alike(make)


class Seeing(models.Block):
    """Computes with how its input and its argument lie."""

    def forward(self, h: Tensor, scale: Tensor, table: Any = None) -> Tensor:
        seen = 0.01 * h.stride(1) + 0.02 * scale.stride(0) - 0.1 * h.is_contiguous()
        if table is not None:
            seen += 0.1 * table.flags.f_contiguous
        return super().forward(h + seen * scale[0])


class Seen(Noisy):
    block = Seeing

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH, 3))

    def training_step(self, batch: Any) -> Tensor:
        hidden, scale = self.lying(self.model(batch["tokens"])), torch.sin(self.scale).t()
        table = scale.detach().cpu().numpy()
        for block in self.blocks:
            hidden = block(hidden, scale, table)
            assert torch.zeros_like(hidden).stride() == self.lying(torch.ones(hidden.shape)).stride()
            assert not hidden.is_contiguous()
        return functional.cross_entropy(self.head(hidden.mean(1)), batch["y"])


@pytest.mark.parametrize("microbatches", ["stack", slow("batch")])
def test_what_blocks_see(microbatches: str) -> None:
    assert_alike(Seen, microbatches=microbatches)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.inner(h))


class Images(LightningModule):
    """Its weights are channels last, or what enters the blocks."""

    def __init__(self, weights: bool, images: bool) -> None:
        super().__init__()
        self.images = images
        self.front = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(Convolution() for _ in range(4)))
        self.head = nn.Linear(4, 2)
        if weights:
            self.to(memory_format=torch.channels_last)

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.blocks(self.front(x.to(memory_format=torch.channels_last) if self.images else x))
        self.log("lies", float(hidden.stride(1)))
        hidden = hidden * (1 + 0.3 * torch.randn_like(hidden))
        return functional.cross_entropy(self.head(functional.dropout(hidden, 0.2).mean((2, 3))), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def images() -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(1)
    rows = [(torch.randn(3, 6, 6, generator=draws), index % 2) for index in range(21)]
    return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("weights", "lies"), [(True, False), (False, True), (True, True)])
def test_channels_last(weights: bool, lies: bool) -> None:
    assert_alike(lambda: Images(weights, lies), data=images())


class Returning(Noisy):
    """Its validation step hands out what the blocks have made."""

    seen: Any = None

    def validation_step(self, batch: Any, _: int) -> Any:
        return {"hidden": self.run(self.lying(self.model(batch["tokens"])))}

    def on_validation_batch_end(self, outputs: Any, *_: Any) -> None:
        type(self).seen = outputs["hidden"].detach().clone()


def test_results_that_are_put_together() -> None:
    found = []
    for devices, strategy in ((1, None), (3, {"num_microbatches": 4, "verbose": False})):
        train(Returning, batches(), devices, strategy, max_steps=1, val_data=batches())
        found.append(Returning.seen)
    torch.testing.assert_close(*found)
    assert found[0].stride() == found[1].stride()
