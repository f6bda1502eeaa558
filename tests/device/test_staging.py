"""Copies beside the device's work: whole when they are handed over or used, and in bounded memory."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skippipe_plugin.engine.errors import GenerationAborted
from skippipe_plugin.engine.staging import PinnedMemory, Staging

DEVICE = "sim:4"


def counts() -> dict[str, int]:
    import sim_device

    return sim_device.counts(4)


def _staging(limit_bytes: int = 1 << 20) -> Staging:
    return Staging(torch.device(DEVICE), PinnedMemory(limit_bytes))


def _numbers(start: int, shape: tuple[int, ...] = (3, 4)) -> Tensor:
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_what_is_handed_over_is_there_and_in_order() -> None:
    staging, sent = _staging(), list[Tensor]()
    tensors = [_numbers(start).to(DEVICE) for start in range(5)]
    for tensor in (*tensors, tensors[0].T):
        assert staging.send(tensor, lambda copy: sent.append(copy.clone()))
        tensor.add_(100)  # after the copy, in the order of the device
    staging.settle()
    expected = [*(_numbers(start) for start in range(5)), _numbers(100).T]
    assert all(map(torch.equal, sent, expected))


def test_what_has_come_is_there_before_its_memory_is_used_again() -> None:
    staging = _staging(limit_bytes=2 * 48)
    placed: list[Tensor] = []
    for start in range(6):
        while (room := staging.room((3, 4), torch.float32)) is None:
            pass
        room.copy_(_numbers(start))
        placed.append(staging.place(room))
    assert {tensor.device for tensor in placed} == {torch.device(DEVICE)}
    assert all(torch.equal(tensor.cpu(), _numbers(start)) for start, tensor in enumerate(placed))
    assert counts()["recorded"] >= 6


def test_memory_of_a_validation_serves_in_training() -> None:
    staging, sent = _staging(), list[Tensor]()
    for inference in (True, False):
        with torch.inference_mode(inference):
            room = staging.room((3, 4), torch.float32)
            assert room is not None
            placed = staging.place(room.fill_(2))
            staging.send(placed, sent.append)
            staging.settle()
        assert torch.equal(sent[-1], torch.full((3, 4), 2.0))
        staging.let_go(sent[-1])
    assert (placed * torch.ones(1, device=DEVICE, requires_grad=True)).requires_grad


def test_receiving_waits_for_nothing_and_sending_once() -> None:
    staging = _staging()
    for _ in range(2):
        room = staging.room((2,), torch.int64)
        assert room is not None
        before = counts()["syncs"]
        room.fill_(3)
        placed = staging.place(room)
        assert counts()["syncs"] == before
        staging.send(placed, staging.let_go)
        staging.settle()
        assert counts()["syncs"] == before + 1


def test_memory_is_used_again_and_bounded() -> None:
    memory = PinnedMemory(limit_bytes=100)
    first = memory.lend((10,), torch.float32)
    assert first is not None
    assert first.is_pinned()
    address = first.data_ptr()
    assert memory.lend((20,), torch.float32) is None
    assert memory.take_back(first)
    assert not memory.take_back(first)
    again = memory.lend((5, 2), torch.int32)
    assert again is not None
    assert again.data_ptr() == address
    memory.take_back(again)
    assert memory.lend((100,), torch.uint8) is not None  # in the place of what is free
    assert memory.num_bytes == 100


def test_what_has_no_room_or_is_elsewhere_is_not_taken() -> None:
    staging = _staging(limit_bytes=8)
    assert not staging.send(_numbers(0).to(DEVICE), _never)
    assert not staging.send(torch.ones(1, device="sim:5"), _never)
    assert Staging.of(torch.device("cpu")) is None


@pytest.mark.parametrize("error", [GenerationAborted("broken"), torch.OutOfMemoryError("of the device")])
def test_who_sends_is_told_what_could_not_be_handed_over(error: Exception) -> None:
    staging, sent = _staging(), list[Tensor]()
    staging.send(_numbers(0).to(DEVICE), _raising(error))
    with pytest.raises(type(error), match=str(error)):
        staging.settle()
    with pytest.raises(GenerationAborted, match="before"):
        staging.send(_numbers(0).to(DEVICE), sent.append)
    assert not sent


def test_nothing_stays_when_it_is_let_go() -> None:
    staging, before = _staging(), set(threading.enumerate())
    tensor = _numbers(0).to(DEVICE)
    kept = weakref.ref(tensor)
    staging.send(tensor, staging.let_go)
    staging.settle()
    del tensor
    assert kept() is None
    (thread,) = set(threading.enumerate()) - before
    del staging
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


def _never(_: Tensor) -> None:
    pytest.fail("handed over")


def _raising(error: Exception) -> Callable[[Tensor], None]:
    def hand_over(_: Tensor) -> None:
        raise error

    return hand_over
