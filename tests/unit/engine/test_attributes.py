"""Attributes of blocks: what counts as a change, and how changes travel."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from skippipe_plugin.engine.attributes import GONE, BlockWatch, apply_changes, attributes_kept, pack_changes


def block() -> Any:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    module.number, module.items, module.names = 1.5, [1, {"a": 2}], {"x"}
    module.options, module.tensor, module.nothing = SimpleNamespace(depth=[1]), torch.zeros(2), float("nan")
    return module


CHANGES: dict[str, Callable[[Any], object]] = {
    "number": lambda b: setattr(b, "number", 2.5),
    "new": lambda b: setattr(b, "other", None),
    "gone": lambda b: delattr(b, "number"),
    "list": lambda b: b.items.append(3),
    "inner dictionary": lambda b: b.items[1].update(a=3),
    "key": lambda b: b.items[1].update(b=b.items[1].pop("a")),
    "set": lambda b: (b.names.clear(), b.names.add("y")),
    "object": lambda b: b.options.depth.append(2),
    "tensor": lambda b: b.tensor.add_(1),
    "part": lambda b: setattr(b[1], "p", 0.25),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_and_named(what: str) -> None:
    module = block()
    watch = BlockWatch(module)
    assert watch.unchanged()
    CHANGES[what](module)
    assert not watch.unchanged()
    assert len(watch.differences()) == 1
    assert watch.unchanged()


def test_an_equal_value_is_no_difference() -> None:
    module = block()
    watch = BlockWatch(module)
    module.items, module.options, module.nothing = [1, {"a": 2}], SimpleNamespace(depth=[1]), float("nan")
    assert not watch.unchanged()
    assert watch.differences() == set()


def test_what_is_ignored_may_come_and_go() -> None:
    module = block()
    watch = BlockWatch(module, {(0, "number"), (0, "later")})
    module.number, module.later = 7, 8
    assert watch.unchanged()
    module.other = 1
    assert not watch.unchanged()


def test_changes_travel_without_their_tensors() -> None:
    here, there = block(), block()
    changes = {(0, "number"): 3, (0, "names"): GONE, (0, "tensor"): torch.ones(2), (0, "tied"): here[0].weight}
    packed, tensors = pack_changes(changes, here)
    assert len(tensors) == 1
    apply_changes(there, packed, tensors)
    assert there.number == 3
    assert "names" not in vars(there)
    assert there.tensor.tolist() == [1, 1]
    assert vars(there)["tied"] is there[0].weight


def test_attributes_are_kept_through_what_code_does_to_them() -> None:
    module = block()
    before = BlockWatch(module)
    with attributes_kept(module):
        for change in CHANGES.values():
            change(module)
    assert before.unchanged() or before.differences() == set()
