"""Blocks that get no mask where nothing of a microbatch is padded, though something of the batch is."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.grids import slow

from ..support import assert_same_run, train

PIPELINE = {"num_microbatches": 4, "verbose": False}
SAMPLES, LENGTH = 8, 6
Batch = dict[str, Tensor]


class Attention(nn.Module):
    """A block that looks at the tokens before each, or at all, where it gets no mask."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.into, self.out, self.causal = nn.Linear(8, 24), nn.Linear(8, 8), causal

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.into(hidden)[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and self.causal)
        return hidden + self.out(attended[:, 0])


Mask = Callable[[Tensor], Tensor | None]
MASKS: dict[str, Mask] = {
    "a mask": lambda kept: None if bool(kept.all()) else kept[:, None, None, :].bool(),
    "by its smallest": lambda kept: None if kept.min() == 1 else kept[:, None, None, :].bool(),
    "lengths": lambda kept: None if int(kept.sum(1).min()) == LENGTH else kept[:, None, None, :].bool(),
}


class Model(LightningModule):
    def __init__(self, mask: Mask, causal: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Attention(causal) for _ in range(2))
        self.mask = mask

    def training_step(self, batch: Batch, _: int) -> Tensor:
        hidden, mask = self.embed(batch["ids"]), self.mask(batch["attention_mask"])
        for block in self.blocks:
            hidden = block(hidden, mask)
        return F.cross_entropy(self.head(hidden[:, 0]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches(since: int, first: int, dtype: torch.dtype = torch.long) -> DataLoader[Any]:
    """Batches with padding in each microbatch, but from the batch ``since`` on in that which begins at ``first``."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(since + 3):
        ids = torch.randint(1, 16, (SAMPLES, LENGTH), generator=generator)
        mask = torch.ones(SAMPLES, LENGTH, dtype=dtype)
        for sample, length in enumerate(torch.randint(2, LENGTH, (SAMPLES,), generator=generator).tolist()):
            mask[sample, length:] = 0
        if number >= since:
            mask[first : first + 2] = 1
        labels = torch.randint(0, 4, (SAMPLES,), generator=generator)
        found.append({"ids": ids * mask.long(), "attention_mask": mask, "labels": labels})
    return DataLoader(found, batch_size=None)  # type: ignore[arg-type]


def whole(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for record in caplog.records if "runs once, on the whole" in (text := record.getMessage())]


@pytest.mark.parametrize("first", [0, slow(4)])
@pytest.mark.parametrize("since", [0, 4])
@pytest.mark.parametrize("causal", [False, slow(True)])
def test_no_mask_for_one_microbatch(causal: bool, since: int, first: int, caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Model:
        return Model(MASKS["a mask"], causal)

    data = batches(since, first)
    fit: dict[str, Any] = {"max_steps": len(data)}
    with caplog.at_level(logging.WARNING):
        found = train(make, data, 3, PIPELINE, **fit)
    assert_same_run(found, train(make, data, 1, **fit))
    assert ["is None there where the batch's is a tensor" in text for text in whole(caplog)] == [True] * causal


@pytest.mark.parametrize("dtype", [torch.bool, slow(torch.float32)])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_other_kinds(name: str, dtype: torch.dtype) -> None:
    def make() -> Model:
        return Model(MASKS[name], True)

    data = batches(4, 2, dtype)
    fit: dict[str, Any] = {"max_steps": len(data)}
    assert_same_run(train(make, data, 3, PIPELINE, **fit), train(make, data, 1, **fit))
