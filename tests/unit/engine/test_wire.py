"""Calls as they travel: what arrives is what was sent, and neither end keeps what the other has forgotten."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skippipe_plugin.driver.capture import side_inputs
from skippipe_plugin.driver.capture.side_inputs import Digests, Outbox, PreparedCall
from skippipe_plugin.engine.arguments import SideInput, Template
from skippipe_plugin.engine.call import Ambient, Call, CallSpec
from skippipe_plugin.engine.control.values import CallNews
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.wire import CallDecoder

ROOM = 100
"""How many bytes of side inputs a worker keeps here: those of three tensors of ``side_input``."""


class Worker:
    """A decoder, and which of the tensors that it was sent are still alive."""

    def __init__(self) -> None:
        self.decoder = CallDecoder(self._receive)
        self._received: list[weakref.ref[Tensor]] = []
        self.outbox = Outbox()

    def _receive(self, tensor: Tensor) -> Tensor:
        own = tensor.clone()
        self._received.append(weakref.ref(own))
        return own

    def living_bytes(self) -> int:
        living = [tensor for each in self._received if (tensor := each()) is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in living)

    @property
    def num_received(self) -> int:
        return len(self._received)

    def tell(self, step: int, calls: list[PreparedCall]) -> list[tuple[int, Call]]:
        news, blobs = self.outbox.encode(step, calls, {})
        return self.decoder.decode(news, [bytes(blob) for blob in blobs])


def side_input(value: int) -> Tensor:
    return torch.full((8,), float(value))


def prepared(microbatch: int, values: list[int], digests: Digests) -> PreparedCall:
    tensors = tuple(side_input(value) for value in values)
    template = Template((None, *(SideInput(slot) for slot in range(len(tensors)))), {}, 0)
    spec = CallSpec((), (template,), (0,), (), Ambient(True, False, ()))
    names = digests.digests(tensors)
    return PreparedCall(microbatch, Call(spec, tensors, seed=microbatch), len(tensors), names)


@given(st.lists(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=3), min_size=1, max_size=12))
@settings(max_examples=40)
def test_a_worker_keeps_no_more_than_it_is_meant_to(steps: list[list[list[int]]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_inputs, "_KEPT_BYTES", ROOM)
        worker, digests = Worker(), Digests()
        for number, step in enumerate(steps):
            calls = [prepared(index, values, digests) for index, values in enumerate(step)]
            arrived = worker.tell(number, calls)
            for (index, call), values in zip(arrived, step, strict=True):
                assert [tensor.tolist() for tensor in call.side_inputs] == [[float(value)] * 8 for value in values]
                assert call.seed == index
            in_use = 32 * len({value for values in step for value in values})
            del arrived, call
            assert worker.living_bytes() <= max(ROOM, in_use)


def test_a_side_input_that_was_dropped_is_sent_again_and_others_are_not() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_inputs, "_KEPT_BYTES", ROOM)
        worker, digests = Worker(), Digests()
        for step, values in enumerate([[0, 1, 2], [0, 1, 2], [3], [1], [0]]):
            worker.tell(step, [prepared(0, values, digests)])
        assert worker.num_received == 3 + 1 + 1  # 3 takes the place of 0, which is needed again at the end


def test_specs_that_were_forgotten_travel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_inputs, "_KEPT_SPECS", 2)
    worker, digests = Worker(), Digests()
    sent = []
    for values in ([], [0], [0, 1], [], [0, 1]):
        news, blobs = worker.outbox.encode(0, [prepared(0, values, digests)], {})
        lacking = news.lacking
        sent.append(([], []) if lacking is None else (list(lacking.specs), list(lacking.dropped_specs)))
        ((_, call),) = worker.decoder.decode(news, [bytes(blob) for blob in blobs])
        assert len(call.spec.templates[0].args) == 1 + len(values)
    assert sent == [([0], []), ([1], []), ([2], [0]), ([0], [1]), ([], [])]
    stale = CallNews(7, [0], [1], [0], [["unknown"]], None)
    # The spec is gone at the other end too, before the side input is asked.
    with pytest.raises(SkipPipeError, match="a call of step 7 names 1, which was never sent"):
        worker.decoder.decode(stale, [])
