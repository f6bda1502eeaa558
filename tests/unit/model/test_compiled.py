"""What ``torch.compile`` was told reaches the processes that the blocks are in, or is refused."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from skippipe_plugin.engine.compilation import Compilation
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.model.compiled import CompiledParts


def own_backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    return graph.forward


def locked() -> Callable[..., Any]:
    """A backend that no other process can have."""
    lock = threading.Lock()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        with lock:
            return graph.forward

    return backend


def every_guard(guards: Any) -> list[bool]:
    return [True for _ in guards]


def around(**settings: Any) -> CompiledParts:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return CompiledParts(torch.compile(net, **settings), list(net))


def in_place(**settings: Any) -> CompiledParts:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net.compile(**settings)
    return CompiledParts(net, list(net))


def one_by_one(**settings: Any) -> CompiledParts:
    blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for block in blocks:
        block.compile(**copy.deepcopy(settings))  # torch takes some options out of their dictionary
    return CompiledParts(nn.Sequential(*blocks), blocks)


EAGER = {"backend": "eager", "fullgraph": False, "dynamic": None}
INDUCTOR = {**EAGER, "backend": "inductor"}


@pytest.mark.parametrize("make", [around, in_place, one_by_one])
@pytest.mark.parametrize(
    ("given", "arrives"),
    [
        ({}, INDUCTOR),
        ({"backend": "eager"}, EAGER),
        ({"backend": "aot_eager", "dynamic": True}, {**EAGER, "backend": "aot_eager", "dynamic": True}),
        ({"backend": "cudagraphs"}, {**EAGER, "backend": "cudagraphs"}),
        ({"backend": "eager", "fullgraph": True}, {**EAGER, "fullgraph": True}),
        ({"backend": own_backend}, {**EAGER, "backend": own_backend}),
        ({"backend": lookup_backend("eager")}, EAGER),
        ({"backend": own_backend, "mode": "quick"}, {**EAGER, "backend": own_backend, "mode": "quick"}),
        ({"backend": own_backend, "options": {"a": 1}}, {**EAGER, "backend": own_backend, "options": {"a": 1}}),
        ({"mode": "reduce-overhead"}, {**INDUCTOR, "options": {"triton.cudagraphs": True}}),
        ({"options": {"max_autotune": True}}, {**INDUCTOR, "options": {"max_autotune": True}}),
        (
            {"backend": "eager", "options": {"guard_filter_fn": every_guard}},
            {**EAGER, "options": {"guard_filter_fn": every_guard}},
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) or "default",
)
def test_settings(make: Callable[..., CompiledParts], given: dict[str, Any], arrives: dict[str, Any]) -> None:
    arrived = Compilation.unpack(make(**copy.deepcopy(given)).compilation.pack())
    assert arrived.settings == {0: {"": arrives}, 1: {"": arrives}}
    blocks = {0: nn.Linear(2, 2), 5: nn.Linear(2, 2)}
    arrived.compile(blocks)
    assert blocks[0]._compiled_call_impl is not None
    assert blocks[5]._compiled_call_impl is None
    again = CompiledParts(nn.Sequential(blocks[0]), [blocks[0]]).compilation
    assert again.settings == {0: {"": arrives}}


def test_blocks_keep_their_own_settings() -> None:
    blocks = [nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), nn.Linear(2, 2)]
    blocks[0][0].compile(backend="eager")
    blocks[1].compile(backend="aot_eager")
    settings = CompiledParts(nn.Sequential(*blocks), blocks).compilation.settings
    assert settings == {0: {"0": EAGER}, 1: {"": {**EAGER, "backend": "aot_eager"}}}


def test_the_outermost_settings_hold() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].compile(backend="aot_eager")
    settings = CompiledParts(torch.compile(net, backend="eager"), list(net)).compilation.settings
    assert settings == {0: {"": EAGER}, 1: {"": EAGER}}


def test_disabled_is_not_compiled() -> None:
    assert in_place(disable=True).compilation.pack() == b""
    assert around(disable=True).compilation.pack() == b""


def test_what_no_worker_can_have_is_refused() -> None:
    with pytest.raises(SkipPipeError, match=r"settings of torch\.compile cannot be sent to the workers"):
        around(backend=locked()).compilation.pack()


def test_what_cannot_be_told_is_refused() -> None:
    block = nn.Linear(2, 2)
    block._compiled_call_impl = lambda *args: args
    with pytest.raises(SkipPipeError, match="with what settings the model is compiled cannot be told"):
        _ = CompiledParts(nn.Sequential(block), [block]).compilation
