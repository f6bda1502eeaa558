"""What a worker keeps while drivers come and go: records, and stages whose last step may still be due."""

from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn
from torch.optim import SGD

from skippipe_plugin.engine.control.commands import Arrange, Load
from skippipe_plugin.engine.control.keeping import (
    AskRecord,
    AskSummary,
    FinishStep,
    GetRetained,
    LetGo,
    Part,
    Prepare,
    Retain,
    Settle,
    Store,
    Summary,
)
from skippipe_plugin.engine.control.values import Record, Stand, StepOrder
from skippipe_plugin.engine.handover import pack_blocks, pack_object, pack_tensors, unpack_object, unpack_tensors
from skippipe_plugin.engine.optimizer import OptimizerPlan, settings_of
from skippipe_plugin.engine.parcel import Parcel
from skippipe_plugin.engine.wire import encode_optimizer_state
from skippipe_plugin.worker.keep import Keep

SETTINGS = settings_of(SGD([nn.Parameter(torch.zeros(1))], lr=0.5))


def stored(name: str, fit: int, step: int, data: bytes, *, lasting: bool = False) -> Store:
    return Store(Record(name, fit, step, lasting, []), False, [data])


def holding(value: float) -> Keep:
    """A worker with one parameter, whose gradient is 1 and whose learning rate will be 0.5."""
    keep, block = Keep(), nn.Linear(1, 1, bias=False)
    nn.init.constant_(block.weight, value)
    packed, blobs = pack_blocks({0: block})
    load = Load(1, 0, True, True, 1, packed, {}, [], b"", blobs)
    keep.holdings.load(load, torch.device("cpu"))
    plan = OptimizerPlan(SGD, {"lr": 0.5}, (((0, "weight"),),), SETTINGS)
    keep.holdings.build_optimizer(cloudpickle.dumps(plan))
    weight(keep).grad = torch.ones(1, 1)
    return keep


def weight(keep: Keep) -> nn.Parameter:
    return next(iter(keep.holdings.blocks()[0].parameters()))


def finish(step: int, fit: int = 1) -> FinishStep:
    return FinishStep(StepOrder(None, None, "", False, False, [], step), fit, SETTINGS.dumps())


def test_a_step_that_was_commanded_twice_is_taken_once() -> None:
    keep = holding(2.0)
    keep.settle(Settle(Stand(1, 6)))
    keep.prepare(Prepare(Stand(1, 7)))
    keep.finish_step(finish(7))
    weight(keep).grad = torch.ones(1, 1)
    keep.finish_step(finish(7))
    assert float(weight(keep).detach()) == 1.5
    keep.prepare(Prepare(Stand(1, 8)))
    keep.finish_step(finish(8))
    assert float(weight(keep).detach()) == 1.0


def test_a_step_is_not_taken_with_gradients_that_are_not_its() -> None:
    """A worker that was cut off has those of an earlier step, or a part of them, or is in another fit."""
    keep = holding(2.0)
    keep.settle(Settle(Stand(1, 6)))
    keep.finish_step(finish(7))
    keep.prepare(Prepare(Stand(1, 7)))
    keep.finish_step(finish(8))
    keep.finish_step(finish(7, fit=2))
    assert float(weight(keep).detach()) == 2.0
    (left,) = keep.summary(AskSummary()).parts
    assert (left.stand, left.whole) == (Stand(1, 6), Stand(1, 7))


def test_what_is_retained_stays_until_all_is_settled() -> None:
    keep = holding(2.0)
    for name in ("base", "tensors", "progress"):
        keep.store(stored(name, fit=1, step=3, data=b"data"))
    keep.retain(Retain())
    assert not keep.holdings.stages
    keep.retain(Retain())  # a second driver that is lost on the way changes nothing
    keep.store(stored("base", fit=1, step=3, data=b"newer"))
    summary = keep.summary(AskSummary())
    assert [part.blocks for part in summary.parts] == [[0]]
    assert set(summary.records) == {"base", "tensors", "progress"}
    assert keep.record(AskRecord("base")).blobs == [b"data"]
    keep.settle(Settle(Stand(1, 3)))
    assert keep.summary(AskSummary()).parts == [Part([], Stand(1, 3), Stand(1, 3))]


def order(stages: list[Any], arriving: dict[int, float], records: dict[str, Any]) -> Arrange:
    """Hold these stages: some blocks come, with one weight each; nothing is kept."""
    weights = {f"{block}\tweight": torch.full((1, 1), value) for block, value in arriving.items()}
    parcel = Parcel(
        structure=pack_blocks({block: nn.Linear(1, 1, bias=False) for block in arriving}, values=False),
        weights=pack_tensors(weights),
        gradients=pack_tensors({}),
        optimizer=encode_optimizer_state({}),
        attributes=([], []),
        plan=None,
        records=records,
    )
    parts, blobs = parcel.pack()
    return Arrange(stages, [], {}, 1, [], [], Stand(1, 3), parts, b"", blobs)


def found(keep: Keep) -> dict[int, float]:
    """What a driver that comes anew gathers: each block, from whichever part of what is left."""
    blocks: dict[int, float] = {}
    for number, part in enumerate(keep.summary(AskSummary()).parts):
        state = keep.retained(GetRetained(number, "weights", part.blocks))
        blocks |= {int(name[0]): float(tensor) for name, tensor in unpack_tensors(state.tensors, state.blobs).items()}
    return blocks


@pytest.mark.parametrize("times", [1, 2])
def test_blocks_that_go_elsewhere_are_kept_until_all_orders_are_carried_out(times: int) -> None:
    """Whichever of them the driver dies at."""
    keep = holding(2.0)
    for name in ("base", "tensors", "progress"):
        keep.store(stored(name, fit=1, step=3, data=b"data"))
    for _ in range(times):
        keep.arrange(order([[1, [1], []]], {1: 5.0}, {}), torch.device("cpu"))
    assert list(keep.holdings.blocks()) == [1]
    assert found(keep) == {0: 2.0, 1: 5.0}
    assert set(keep.summary(AskSummary()).records) == {"base", "tensors", "progress"}
    keep.retain(Retain())
    keep.retain(Retain())
    assert found(keep) == {0: 2.0, 1: 5.0}
    assert keep.record(AskRecord("base")).blobs == [b"data"]


def test_then_they_are_gone_and_the_records_are_those_that_came() -> None:
    keep = holding(2.0)
    keep.store(stored("base", fit=1, step=3, data=b"old"))
    record = stored("progress", 1, 3, b"").record, [b"new"]
    keep.arrange(order([[1, [1], []]], {1: 5.0}, {"progress": record}), torch.device("cpu"))
    keep.let_go(LetGo())
    assert found(keep) == {1: 5.0}
    assert keep.summary(AskSummary()).records == {"progress": (1, 3)}
    assert keep.record(AskRecord("progress")).blobs == [b"new"]
    keep.drop()
    assert found(keep) == {}
    assert not keep.holdings.stages


def test_results_outlast_other_stages() -> None:
    keep = holding(2.0)
    keep.store(stored("result1", 1, 3, b"end", lasting=True))
    keep.store(stored("base", fit=2, step=0, data=b""))
    keep.forget()
    keep.retain(Retain())
    assert keep.summary(AskSummary()) == Summary([Part([0], Stand(), Stand())], {}, [1])
    assert keep.record(AskRecord("result1")).blobs == [b"end"]


def test_objects_travel_with_their_tensors_apart() -> None:
    shared = nn.Parameter(torch.arange(4.0), requires_grad=False)
    entries, blobs = pack_object({"a": shared, "b": [shared, 1], "c": torch.zeros(0, 3)})
    assert [entry[1] for entry in entries] == [[4], [0, 3]]
    found = unpack_object(entries, [bytearray(blob) for blob in blobs])
    assert found["a"] is found["b"][0]
    assert not found["a"].requires_grad
    assert torch.equal(found["a"], shared)
    assert found["c"].shape == (0, 3)
