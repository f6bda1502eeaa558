"""What the user's code has changed is taken back before it runs once more."""

import random
from collections import UserDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.driver.capture.contents import undo_changes
from skippipe_plugin.driver.capture.undo import undo_all
from skippipe_plugin.engine.errors import SkipPipeError

CPU = torch.device("cpu")


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.calls, self.kept, self.names, self.sums = 0, [1], {"a": 1}, torch.zeros(2)


def test_modules_and_draws() -> None:
    module = Module()
    undo = undo_all(module, CPU, None)
    before = torch.rand(2), random.random(), np.random.rand()
    module.norm(torch.randn(4, 2))
    module.calls += 1
    module.kept.append(2)
    module.names["b"] = 2
    module.sums += 1
    module.new = 3
    undo()
    assert (module.calls, module.kept, module.names, module.sums.tolist()) == (0, [1], {"a": 1}, [0, 0])
    assert not hasattr(module, "new")
    assert int(module.norm.num_batches_tracked) == 0
    after = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@dataclass
class Sample:
    x: Tensor
    more: list[Any] = field(default_factory=list)


def test_batches() -> None:
    x, y = torch.ones(2), torch.ones(3)
    batch = {"x": x, "pair": [y, (x, "text")], "own": Sample(y), "user": UserDict(z=x)}
    batch["itself"] = batch
    undo = undo_changes(batch)
    batch["x"] = batch["x"] * 2
    batch["pair"].pop()
    batch["own"].x = None
    batch["own"].more.append(1)
    batch["user"]["z"] = 5
    y.mul_(3)
    undo()
    assert batch["x"] is x
    assert batch["pair"][0] is y
    assert batch["pair"][1] == (x, "text")
    assert batch["own"].x is y
    assert batch["own"].more == []
    assert batch["user"]["z"] is x
    assert y.tolist() == [1, 1, 1]


@pytest.mark.parametrize("make", [iter, enumerate, lambda items: (each for each in items)])
def test_what_an_iterator_has_given_cannot_be_put_back(make: Any) -> None:
    batch = {"x": torch.ones(2), "more": [make([1, 2])]}
    undo = undo_changes(batch)
    with pytest.raises(SkipPipeError, match="Make it a list in the collate function"):
        undo()
