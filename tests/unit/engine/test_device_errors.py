"""Errors of devices stay what they are: where a tensor is received, where a block is asked, and on their way."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn

from skippipe_plugin.engine.call import Call, Hop
from skippipe_plugin.engine.device_errors import is_lasting, is_of_device
from skippipe_plugin.engine.errors import SkipPipeError, pack_exception, unpack_exception
from skippipe_plugin.engine.executor import Executor
from skippipe_plugin.engine.independence import Parts
from skippipe_plugin.engine.program import Instruction, Link, Plan
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.transport import TensorSpec, Transport
from skippipe_plugin.schedule import Action, Op

from .test_stage import call_of

CPU = torch.device("cpu")
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB")
ASSERT = torch.AcceleratorError("CUDA error: device-side assert triggered")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
FORWARD = Instruction(Action(1, Op.F, 0), "1F0", takes=0, gives=1, receives=Link(0, 1, 0), sends=Link(0, 2, 0))


class Transport1:
    """What is received cannot be moved to the device."""

    rank, posts_ahead, is_aborted = 1, True, False

    def __init__(self, error: Exception) -> None:
        self.error = error

    def receive(self, *_: Any) -> Any:
        return self

    def wait(self) -> Tensor:
        raise self.error


class Feed:
    def __init__(self, call: Call) -> None:
        self.call = call

    def poll(self) -> list[tuple[int, Call]]:
        return [(0, self.call)]

    wait = poll


def received(error: Exception) -> None:
    module = nn.Linear(4, 4)
    call = call_of(module, grad=True)
    hop = Hop(TensorSpec((2, 4), torch.float32), True)
    call = dataclasses.replace(call, spec=dataclasses.replace(call.spec, hops=(hop, hop)))
    executor = Executor(cast("Transport", Transport1(error)), {1: Stage(1, {0: module}, CPU)}, CPU)
    executor.run(Plan([FORWARD], {0}), Feed(call))


@pytest.mark.parametrize("error", [OOM, ASSERT, HOST], ids=lambda error: type(error).__name__)
def test_what_cannot_be_moved_to_the_device_is_no_error_of_the_pipeline(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        received(error)
    assert caught.value is error


def test_what_else_fails_is_named() -> None:
    with pytest.raises(SkipPipeError, match="receiving for 1F0 failed"):
        received(RuntimeError("something else"))


class Full(nn.Module):
    """Has memory for parts of a batch, or not even for them."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least

    def forward(self, hidden: Tensor) -> Tensor:
        if len(hidden) >= self.least:
            raise torch.OutOfMemoryError(str(OOM))
        return hidden


@pytest.mark.parametrize("least", [2, 4])
def test_a_block_without_memory_is_not_said_to_mix_samples(least: int) -> None:
    module = Full(least)
    call = call_of(module, grad=False)
    stage = Stage(1, {0: module}, CPU)
    with pytest.raises(torch.OutOfMemoryError):
        stage.difference_of_parts(0, call, TensorSpec((4, 3), torch.float32), Parts((call, call), (2, 2), 0, 0))


@pytest.mark.parametrize("error", [OOM, ASSERT, HOST], ids=lambda error: type(error).__name__)
def test_on_their_way(error: Exception) -> None:
    arrived = unpack_exception(*pack_exception(error), "rank 2 (stages 3)")
    assert type(arrived) is type(error)
    assert is_of_device(arrived)
    assert is_oom_error(arrived) == (error is not ASSERT)
    assert is_lasting(arrived) == (error is ASSERT)
    assert "rank 2 (stages 3)" in "".join(arrived.__notes__)


def _caused(error: Exception) -> Exception:
    try:
        raise ValueError from error
    except ValueError as caught:
        return caught


@pytest.mark.parametrize(
    ("make", "lasts"),
    [
        (lambda: ASSERT, True),
        (lambda: RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (lambda: _caused(ASSERT), True),
        (lambda: OOM, False),
        (lambda: torch.AcceleratorError("CUDA error: out of memory"), False),
        (lambda: RuntimeError("shapes differ"), False),
        (lambda: ValueError("device-side assert"), False),
    ],
)
def test_after_which_the_process_is_of_no_use(make: Callable[[], Exception], lasts: bool) -> None:
    assert is_lasting(make()) == lasts
