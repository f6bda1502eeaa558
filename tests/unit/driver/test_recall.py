"""What another driver finds: also when a worker dies as it looks, or had died together with the last driver."""

import json
import queue
import time
from typing import Any

import pytest
import torch
from torch import nn

from skippipe_plugin.driver.links import Link
from skippipe_plugin.driver.recovery.recall import Recalled, rebuilt, recall
from skippipe_plugin.engine.channel import ChannelClosed, Message
from skippipe_plugin.engine.control.handlers import Handlers
from skippipe_plugin.engine.control.keeping import Store
from skippipe_plugin.engine.control.messages import TO_DRIVER, TO_WORKER
from skippipe_plugin.engine.control.values import Record
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.handover import pack_object
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.wire import tensor_key, tensor_name
from skippipe_plugin.worker.keep import Keep

STAGES = {1: [0, 1], 2: [2], 3: [3], 4: [4, 5]}
NORMS = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}


def found(*lost: int) -> Recalled:
    """What was found when some stages were not: block k holds the number k."""
    empty: dict[str, Any] = {}
    return Recalled(
        fit=1,
        step=7,
        pending=None,
        base={"blocks": {block: f"blocks.{block}" for blocks in STAGES.values() for block in blocks}},
        tensors=empty,
        progress=empty,
        weights={
            tensor_name(block, "weight"): torch.full((2,), float(block))
            for stage, blocks in STAGES.items()
            if stage not in lost
            for block in blocks
        },
        optimizer={},
        living=[(STAGES[stage], norm) for stage, norm in NORMS.items() if stage not in lost],
    )


def blocks_of(recalled: Recalled) -> dict[int, float]:
    return {tensor_key(key)[0]: float(tensor[0]) for key, tensor in recalled.weights.items()}


def between(before: tuple[float, float], after: tuple[float, float]) -> float:
    """The average of two (value, gradient norm), as CheckFree's code weights them."""
    weights = before[1] + 1e-4, after[1] + 1e-4
    return (before[0] * weights[0] + after[0] * weights[1]) / sum(weights)


def test_what_was_found_stays() -> None:
    recalled = found()
    assert rebuilt(recalled, "norm") == (recalled, {})
    assert rebuilt(recalled, None) == (recalled, {})


@pytest.mark.parametrize(
    ("lost", "expected", "sources"),
    [
        ([2], {2: between((1, 1.0), (3, 3.0))}, {range(2, 3): "neighbours"}),
        ([2, 3], {2: between((0, 1.0), (4, 4.0)), 3: between((1, 1.0), (5, 4.0))}, {range(2, 4): "neighbours"}),
        ([1], {0: 2.0, 1: 2.0}, {range(2): "copy"}),
        ([3, 4], {3: 2.0, 4: 2.0, 5: 2.0}, {range(3, 6): "copy"}),
        ([1, 3], {0: 2.0, 1: 2.0, 3: between((2, 2.0), (4, 4.0))}, {range(2): "copy", range(3, 4): "neighbours"}),
    ],
)
def test_lost_stages_come_from_the_nearest_living_ones(
    lost: list[int], expected: dict[int, float], sources: dict[range, str]
) -> None:
    recalled, came_from = rebuilt(found(*lost), "norm")
    assert came_from == sources
    assert sorted(blocks_of(recalled)) == list(range(6))
    for block, value in blocks_of(recalled).items():
        assert value == pytest.approx(expected.get(block, block))


def test_the_rule_counts() -> None:
    assert blocks_of(rebuilt(found(2), "mean")[0])[2] == pytest.approx(2.0)
    assert rebuilt(found(2), "copy")[1] == {range(2, 3): "copy"}


@pytest.mark.parametrize(("lost", "rule"), [([2], None), ([1, 2, 3, 4], "norm")])
def test_what_cannot_be_rebuilt_is_an_error_that_names_the_blocks(lost: list[int], rule: Any) -> None:
    blocks = [block for stage in lost for block in STAGES[stage]]
    with pytest.raises(SkipPipeError, match=rf"held the blocks \{blocks}, so .* from the last checkpoint"):
        rebuilt(found(*lost), rule)


class Worker:
    """The channel to a worker that holds one block and all records, and dies at its ``dies_at``-th question."""

    peer, is_local = "127.0.0.1:5", True

    def __init__(self, block: int, dies_at: int) -> None:
        self.dies_at, self.asked, self.heard_s = dies_at, 0, time.monotonic()
        self.keep = Keep()
        self.keep.holdings.stages[1 + block] = Stage(1 + block, {block: nn.Linear(2, 2)}, torch.device("cpu"))
        records = {"base": {"blocks": {0: "0", 1: "1"}}, "tensors": {"outcome": None}, "progress": {"phase": "before"}}
        for name, record in records.items():
            entries, blobs = pack_object(record)
            self.keep.store(Store(Record(name, 1, 3, False, entries), True, blobs))
        self.handlers = Handlers()
        self.keep.add_to(self.handlers)
        self.answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def send(self, kind: str, fields: Any = None, blobs: Any = (), **_: Any) -> int:
        self.asked += kind != "Exit"
        if kind == "Exit" or self.asked == self.dies_at:
            self.answers.put(None)
        else:
            question = TO_WORKER.decode(Message(kind, json.loads(json.dumps(fields)), blobs)).body
            answer = self.handlers.obey(question)
            assert answer is not None
            said, about, data = TO_DRIVER.encode(answer, -1)
            self.answers.put(Message(said, json.loads(json.dumps(about)), data, answers=self.asked))
        return self.asked

    def receive(self) -> Message:
        message = self.answers.get()
        if message is None:
            raise ChannelClosed("closed")
        return message

    def close(self) -> None:
        self.answers.put(None)


@pytest.mark.parametrize("dies_at", range(1, 8))
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_dies_while_it_is_asked_is_done_without(which: int, dies_at: int) -> None:
    """The last worker is asked for the records too, so it is asked seven times; the first one four times."""
    workers = [Worker(block, dies_at if block == which else 0) for block in (0, 1)]
    links = [Link(worker) for worker in workers]
    recalled = recall(links)
    assert recalled is not None
    assert (recalled.fit, recalled.step, recalled.progress) == (1, 3, {"phase": "before"})
    survived = {0, 1} - ({which} if workers[which].asked >= dies_at else set())
    assert {tensor_key(key)[0] for key in recalled.weights} == survived
    assert [blocks for blocks, _ in recalled.living] == [[block] for block in sorted(survived)]
    for link in links:
        link.close()
