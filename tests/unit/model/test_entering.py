"""Which arguments of the blocks are each sample's own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from skippipe_plugin.engine.arguments import SideInput, Template
from skippipe_plugin.model.entering import Entered, Entrance

SIZES = [3, 2, 2]
ROWS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
PARTS = list(ROWS.split(SIZES))
MASK = torch.ones(7, 1, 4, 4).tril().bool()
PADDED = MASK.clone()
PADDED[6, :, :, 3] = False


def entered(hidden: Tensor, value: Any) -> Entered:
    tensors = [value] if isinstance(value, Tensor) else []
    template = Template((0, SideInput(0) if tensors else value), {}, 0)
    return Entered(hidden, tuple(tensors), (template,), (0,), ((b"", ()),), 0.0)


def difference(whole: Any, parts: list[Any]) -> str:
    calls = [entered(hidden, value) for hidden, value in zip(PARTS, parts, strict=True)]
    return Entrance(entered(ROWS, whole), calls, SIZES, 2e-5).differs([torch.nn.Identity()])


HEADS = torch.stack([ROWS, -ROWS])  # two heads, each with all samples
FOLLOWS: dict[str, tuple[Any, list[Any]]] = {
    "rows": (ROWS, PARTS),
    "rounded": (ROWS * (1 + 1e-7), PARTS),
    "second dimension": (ROWS.T, [part.T for part in PARTS]),
    "rows of heads": (HEADS.reshape(14, 4), [torch.stack([part, -part]).reshape(-1, 4) for part in PARTS]),
    "heads of rows": (ROWS.repeat_interleave(2, 0), [part.repeat_interleave(2, 0) for part in PARTS]),
    "shared": (torch.eye(7), [torch.eye(7)] * 3),
    "once for all": (MASK, [part[:1] for part in MASK.split(SIZES)]),
    "no mask where nothing is padded": (PADDED, [None, None, PADDED[5:]]),
    "beginnings of sequences": (torch.tensor([0, 2, 5, 6, 9]), [*map(torch.tensor, ([0, 2], [0, 3, 4], [0, 3]))]),
    "endless": (torch.tensor(float("-inf")).expand(7, 1), [torch.full((size, 1), float("-inf")) for size in SIZES]),
    "complex": (torch.complex(ROWS, -ROWS), [torch.complex(part, -part) for part in PARTS]),
    "none": (None, [None] * 3),
    "number": (0.1, [0.1, 0.1 + 1e-9, 0.1]),
    "text": ("eager", ["eager"] * 3),
}
DIFFERS: dict[str, tuple[Any, list[Any]]] = {
    "other rows": (ROWS - ROWS.mean(0), [part - part.mean(0) for part in PARTS]),
    "statistic": (ROWS.std(0), [part.std(0) for part in PARTS]),
    "pairs": (ROWS @ ROWS.T, [part @ part.T for part in PARTS]),
    "numbers of samples": (torch.arange(7), [torch.arange(size) for size in SIZES]),
    "no mask where something is padded": (PADDED, [None, None, None]),
    "nothing": (ROWS.std(), [None, PARTS[1].std(), PARTS[2].std()]),
    "number": (0.1, [0.1, 0.2, 0.1]),
    "count": (7, SIZES),
    "type": (1, [1, 1.0, 1]),
    "form": ((1, 2), [(1, 2), (1,), (1, 2)]),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_what_is_each_samples_own(name: str) -> None:
    assert difference(*FOLLOWS[name]) == ""


@pytest.mark.parametrize("name", DIFFERS)
def test_what_is_computed_over_samples(name: str) -> None:
    assert "the blocks' argument number 1 is another there" in difference(*DIFFERS[name])
