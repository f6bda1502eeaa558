"""What blocks refer to past registration is found, and named with both of its ends."""

import functools
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.partition import find_blocks
from skippipe_plugin.sharing import PartitionError, check_hidden_references


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra: Any = None

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.common, self.blocks = nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(4))
        self.free = torch.zeros(2, requires_grad=True)


def check(model: nn.Module) -> None:
    stack = find_blocks(model, "blocks")
    check_hidden_references(model, stack.names, stack.blocks)


def closure(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: value(hidden)


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held

    def call(self) -> Any:
        return self.held


WAYS: dict[str, Callable[[Any], Any]] = {
    "list": lambda x: [x],
    "dict": lambda x: {"a": x},
    "object": Holder,
    "closure": closure,
    "partial": lambda x: functools.partial(print, x),
    "bound method": lambda x: Holder(x).call,
    "weak reference": weakref.ref,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("what", ["module", "parameter", "other block"])
def test_what_is_shared_in_secret(way: Callable[[Any], Any], what: str) -> None:
    model = Model()
    shared = {"module": model.common, "parameter": model.common.weight, "other block": model.blocks[3].linear}[what]
    for block in list(model.blocks)[:3]:
        block.extra = way(shared)
    owner = r"blocks\.3\.linear\." if what == "other block" else r"common\.weight"
    with pytest.raises(PartitionError, match=rf"blocks\.0\.extra uses {owner}"):
        check(model)


@pytest.mark.parametrize("view", [lambda p: p[0], lambda p: p.detach(), lambda p: p.data, lambda p: p.view(-1)])
@pytest.mark.parametrize("own", [False, True])
def test_views_of_a_parameter(view: Callable[[Tensor], Tensor], own: bool) -> None:
    model = Model()
    with torch.no_grad():
        model.blocks[1].extra = view(model.blocks[1].linear.weight if own else model.common.weight)
    with pytest.raises(PartitionError, match=r"blocks\.1\.extra uses (common|blocks\.1\.linear)\.weight"):
        check(model)


def test_a_module_that_only_blocks_have() -> None:
    model, shared = Model(), nn.Linear(4, 4)
    for block in list(model.blocks)[1:]:
        block.extra = [shared]
    with pytest.raises(PartitionError, match=r"blocks\.2\.extra uses a tensor of blocks\.1"):
        check(model)


@pytest.mark.parametrize("registered", [False, True])
def test_a_reference_back_to_the_model(registered: bool) -> None:
    model = Model()
    model.blocks[0].extra = None if registered else [model]
    if registered:
        model.blocks[0].parent = model
    with pytest.raises(PartitionError, match=r"blocks\.0.* refers back to the whole model"):
        check(model)


def test_blocks_that_nobody_can_call() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

    model = Model()
    model.blocks = nn.ModuleList(Parts() for _ in range(4))
    with pytest.raises(PartitionError, match=r"blocks\.0 \(Parts\) has no forward"):
        check(model)


def test_constants_and_own_parts_are_fine() -> None:
    model, config, table = Model(), SimpleNamespace(width=4, act=nn.functional.gelu), torch.arange(4)
    for block in model.blocks:
        block.extra = [config, table, block.linear, block.linear.weight, nn.GELU(), functools.partial(print, config)]
        block.itself = weakref.ref(block.linear)
        block.register_forward_hook(lambda *args, model=model: None)
    check(model)


class Lazy(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(4)


def traced() -> Block:
    block = Block()
    block.linear = torch.jit.trace(block.linear, torch.zeros(1, 4))
    return block


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.jit.script(nn.Linear(4, 4)), r"^blocks\.0 is compiled by torch.jit"),
        (traced, r"^blocks\.0\.linear is compiled by torch.jit"),
        (Lazy, r"^blocks\.0\.linear is lazy"),
    ],
    ids=["scripted", "traced", "lazy"],
)
def test_blocks_that_cannot_travel_are_refused(make: Callable[[], nn.Module], why: str) -> None:
    model = Model()
    model.blocks = nn.ModuleList(make() for _ in range(4))
    with pytest.raises(PartitionError, match=why):
        check(model)


def test_a_lazy_block_that_has_run_is_no_lazy_one() -> None:
    model = Model()
    model.blocks = nn.ModuleList(Lazy() for _ in range(4))
    nn.Sequential(*model.blocks)(torch.zeros(1, 4))
    check(model)
