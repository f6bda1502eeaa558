"""A block that changes what it was given is found out."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skippipe_plugin.engine.arguments import ArgumentGuard, Packed, SideInput, Template
from skippipe_plugin.engine.errors import SkipPipeError


def forward(self: Any, hidden: Any, context: Any, mask: Any = None) -> None:
    """The block's."""


def guard(context: Any, mask: torch.Tensor | None = None) -> ArgumentGuard:
    marks: tuple[Any, ...] = (None, Packed(b"", ()), None if mask is None else SideInput(0))
    return ArgumentGuard(Template(marks, {}, 0), [None, context, mask], {}, [] if mask is None else [mask])


CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "append": ([], lambda x: x.append(1)),
    "set item": ({}, lambda x: x.update(a=1)),
    "delete": ({"a": 1}, lambda x: x.pop("a")),
    "attribute": (SimpleNamespace(a=1), lambda x: setattr(x, "a", 2)),
    "type": (SimpleNamespace(a=1), lambda x: setattr(x, "a", True)),
    "deep": ({"a": [SimpleNamespace(b={})]}, lambda x: x["a"][0].b.update(c=1)),
    "another tensor": (SimpleNamespace(a=torch.zeros(1)), lambda x: setattr(x, "a", torch.zeros(1))),
    "cannot be pickled": ({}, lambda x: x.update(a=(i for i in ()))),
    "iterator": (iter([1, 2]), next),
}


@pytest.mark.parametrize(("context", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_names_the_argument(context: Any, change: Callable[[Any], Any]) -> None:
    watched = guard(context)
    watched.check(3, forward)
    change(context)
    with pytest.raises(SkipPipeError, match=r"block 3 changes its argument 'context' \(what it holds\)"):
        watched.check(3, forward)


def test_a_tensor_in_place() -> None:
    mask = torch.zeros(2)
    watched = guard({}, mask)
    mask[0] = 1
    with pytest.raises(SkipPipeError, match="block 0 changes its argument 'mask' in place"):
        watched.check(0, forward)
