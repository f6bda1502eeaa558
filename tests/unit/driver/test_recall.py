"""What another driver finds: also when a worker dies as it looks, or had died together with the last driver."""

import json
import queue
import time
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn
from torch.optim import SGD

from skippipe_plugin.driver.links import Link
from skippipe_plugin.driver.recovery import recall as recalling
from skippipe_plugin.driver.recovery.recall import Recalled, rebuilt, recall
from skippipe_plugin.engine.channel import ChannelClosed, Message
from skippipe_plugin.engine.control.handlers import Handlers
from skippipe_plugin.engine.control.keeping import Prepare, Settle, Store
from skippipe_plugin.engine.control.messages import TO_DRIVER, TO_WORKER
from skippipe_plugin.engine.control.values import Record, Stand, StepOrder
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.handover import pack_object
from skippipe_plugin.engine.optimizer import OptimizerPlan, settings_of
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


NOW = Stand(fit=1, step=3)
SGD_OF_ONE = settings_of(SGD([nn.Parameter(torch.zeros(1))], lr=1.0))


class Worker:
    """The channel to a worker that holds one block and all records, and dies at its ``dies_at``-th question.

    With ``pauses_at`` it answers nothing from that question on. Its block holds the number of its ``stand``'s step.
    """

    peer, is_local = "127.0.0.1:5", True

    def __init__(self, block: int, dies_at: int = 0, *, stand: Stand = NOW, pauses_at: int = 0) -> None:
        self.dies_at, self.pauses_at, self.asked, self.heard_s = dies_at, pauses_at, 0, time.monotonic()
        self.keep = Keep()
        linear = nn.Linear(2, 2, bias=False)
        nn.init.constant_(linear.weight, float(stand.step))
        self.keep.holdings.stages[1 + block] = Stage(1 + block, {block: linear}, torch.device("cpu"))
        self.keep.settle(Settle(stand))
        order = StepOrder(None, None, "", False, False, [], stand.step)
        tensors = {"outcome": None, "hyperparameters": SGD_OF_ONE.dumps()}
        records = {"base": {"blocks": {0: "0", 1: "1"}}, "tensors": tensors, "progress": {"phase": "before"}}
        for name, record in records.items():
            entries, blobs = pack_object(record)
            self.keep.store(Store(Record(name, stand.fit, stand.step, False, entries, order), True, blobs))
        self.handlers = Handlers()
        self.keep.add_to(self.handlers)
        self.answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def send(self, kind: str, fields: Any = None, blobs: Any = (), **_: Any) -> int:
        self.asked += kind != "Exit"
        if kind == "Exit" or self.asked == self.dies_at:
            self.answers.put(None)
        elif not self.pauses_at or self.asked < self.pauses_at:
            question = TO_WORKER.decode(Message(kind, json.loads(json.dumps(fields)), blobs)).body
            answer = self.handlers.obey(question)
            assert answer is not None
            said, about, data = TO_DRIVER.encode(answer, -1)
            self.answers.put(Message(said, json.loads(json.dumps(about)), data, answers=self.asked))
            self.heard_s = time.monotonic()
        return self.asked

    def send_if_free(self, *_: Any) -> bool:
        if not self.pauses_at or self.asked < self.pauses_at:
            self.heard_s = time.monotonic() + 1e-3
        return True

    def hang_up(self, *_: Any) -> None:
        self.close()

    def receive(self) -> Message:
        message = self.answers.get()
        if message is None:
            raise ChannelClosed("closed")
        return message

    def close(self) -> None:
        self.answers.put(None)


@pytest.mark.parametrize("dies_at", range(1, 9))
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_dies_while_it_is_asked_is_done_without(which: int, dies_at: int) -> None:
    """The last worker is asked for the records too, so it is asked eight times; the first one five times."""
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


def values(recalled: Recalled | None) -> dict[int, float]:
    assert recalled is not None
    return {tensor_key(key)[0]: float(tensor[0, 0]) for key, tensor in recalled.weights.items()}


@pytest.mark.parametrize("first", [True, False])
def test_what_was_cut_off_from_the_run_is_not_used(first: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that was lost but lives, and comes back, has the weights of an earlier step, or of an earlier fit."""
    behind, other_fit = Worker(0, stand=Stand(1, 2)), Worker(1, stand=Stand(0, 3))
    workers = [Worker(0), Worker(1)]
    links = [Link(worker) for worker in ([behind, other_fit, *workers] if first else [*workers, behind, other_fit])]
    assert values(recall(links)) == {0: 3.0, 1: 3.0}
    assert "[0] on a worker are of optimizer step 2 of fit 1, and the last driver was at step 3 of fit 1" in caplog.text
    for link in links:
        link.close()


def test_blocks_that_only_such_a_worker_has_count_as_lost() -> None:
    links = [Link(Worker(0, stand=Stand(1, 2))), Link(Worker(1))]
    recalled = recall(links)
    assert values(recalled) == {1: 3.0}
    assert recalled is not None
    with pytest.raises(SkipPipeError, match=r"together with every worker that held the blocks \[0\]"):
        rebuilt(recalled, None)
    for link in links:
        link.close()


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_step_that_is_due_is_taken_by_those_who_have_its_gradients(is_whole: bool) -> None:
    """Who was cut off before it was prepared may have a part of them."""
    late, there = Worker(0, stand=Stand(1, 2)), Worker(1)
    holdings = late.keep.holdings
    plan = OptimizerPlan(SGD, {"lr": 1.0}, (((0, "weight"),),), SGD_OF_ONE)
    holdings.build_optimizer(cloudpickle.dumps(plan))
    next(iter(holdings.blocks()[0].parameters())).grad = torch.full((2, 2), -5.0)
    if is_whole:
        late.keep.prepare(Prepare(NOW))
    links = [Link(late), Link(there)]
    assert values(recall(links)) == ({0: 7.0, 1: 3.0} if is_whole else {1: 3.0})
    for link in links:
        link.close()


@pytest.mark.parametrize("pauses_at", [1, 3])
def test_a_worker_that_is_paused_while_it_is_asked_is_done_without(
    pauses_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recalling, "_SILENT_S", 0.5)
    links = [Link(Worker(0, pauses_at=pauses_at)), Link(Worker(1))]
    assert values(recall(links)) == {1: 3.0}
    assert links[0].how_lost == "it gave no sign of life"
    for link in links:
        link.close()
