"""What carries messages between devices through the host: pinned, in order, and waited for where it must be."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from skippipe_plugin.engine.c10d import Store
from skippipe_plugin.engine.pairs import PairTransport
from skippipe_plugin.engine.transport import TensorSpec, Transport
from tests.processes.test_engine import on_threads

SHAPE = (4, 6)
NUM_BYTES = 4 * 6 * 4
DEVICES = ("sim:6", "sim:7")


def _syncs(rank: int) -> int:
    import sim_device

    return sim_device.counts(6 + rank)["syncs"]


def _tagged(store: Store, **shape: Any) -> Transport:
    return Transport(store, **shape, device=torch.device(DEVICES[shape["rank"]]))


def _in_pairs(store: Store, **shape: Any) -> Transport:
    return PairTransport(store, **shape, device=torch.device(DEVICES[shape["rank"]]), backend="gloo")


def _numbers(start: int) -> Tensor:
    return torch.arange(start, start + 24, dtype=torch.float32).view(SHAPE)


def _limited(transport: Transport, num_bytes: int) -> None:
    assert transport._staging is not None
    transport._staging._memory._limit = num_bytes


def _exchanged(limit: int) -> dict[int, list[int]]:
    """Let two ranks exchange rows, several times; return by rank how often each exchange has waited for the device."""
    waits: dict[int, list[int]] = {0: [], 1: []}

    def body(rank: int, transport: Transport) -> None:
        transport.form_subgroup("both", (0, 1))
        _limited(transport, limit)
        counts = ([1, 3], [3, 1])[rank]
        for turn in range(8):
            sent = [_numbers(100 * turn), _numbers(100 * turn + 50)]
            rows = sent[rank].to(DEVICES[rank]).requires_grad_()
            before = _syncs(rank)
            came = transport.all_to_all(rows, counts, counts, "both").wait()
            waits[rank].append(_syncs(rank) - before)
            expected = [sent[0][:1], sent[1][:3]] if rank == 0 else [sent[0][1:], sent[1][3:]]
            assert came.device == torch.device(DEVICES[rank])
            assert torch.equal(came.cpu(), torch.cat(expected))

    on_threads(2, body, _tagged)
    return waits


def test_an_exchange_waits_once_and_its_memory_serves_the_next() -> None:
    assert _exchanged(4 * NUM_BYTES) == {0: [1] * 8, 1: [1] * 8}


def test_an_exchange_has_no_need_of_room() -> None:
    assert _exchanged(NUM_BYTES) == {0: [2] * 8, 1: [2] * 8}  # for one way only
    assert _exchanged(0) == {0: [2] * 8, 1: [2] * 8}


def test_an_exchange_may_bring_nothing_and_take_nothing() -> None:
    def body(rank: int, transport: Transport) -> None:
        transport.form_subgroup("both", (0, 1))
        rows = _numbers(0).to(DEVICES[rank]) if rank == 0 else torch.empty(0, 6, device=DEVICES[rank])
        send, receive = ([0, 4], [0, 0]) if rank == 0 else ([0, 0], [4, 0])
        came = transport.all_to_all(rows, send, receive, "both").wait()
        assert came.device == torch.device(DEVICES[rank])
        assert torch.equal(came.cpu(), _numbers(0) if rank == 1 else torch.empty(0, 6))

    on_threads(2, body, _tagged)


@pytest.mark.parametrize("limit", [0, NUM_BYTES, 100 * NUM_BYTES])
def test_what_goes_over_a_link_without_tags_stays_in_order(limit: int) -> None:
    """Some of it through pinned memory, some of it not, and some of it from the host."""
    kinds = [True, True, False, True, False]

    def body(rank: int, transport: Transport) -> None:
        transport.connect([(0, 1)])
        _limited(transport, limit)
        if rank == 0:
            for index, is_there in enumerate(kinds):
                transport.send(_numbers(index).to(DEVICES[0] if is_there else "cpu").requires_grad_(), 1, index)
            transport.end_step()
        else:
            spec = TensorSpec(SHAPE, torch.float32)
            for index in range(len(kinds)):
                before = _syncs(1)
                came = transport.receive(spec, 0, index, torch.device(DEVICES[1])).wait()
                if limit != NUM_BYTES:  # then the room may serve again or not
                    assert _syncs(1) - before == int(limit == 0)
                assert came.device == torch.device(DEVICES[1])
                assert torch.equal(came.cpu(), _numbers(index))
        over.wait(10)
        transport.flush()

    over = threading.Barrier(2)
    on_threads(2, body, _in_pairs)
