"""What a worker keeps while drivers come and go: records, and stages whose last step may still be due."""

from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn
from torch.optim import SGD

from skippipe_plugin.engine.handover import pack_blocks, pack_object, pack_tensors, unpack_object, unpack_tensors
from skippipe_plugin.engine.optimizer import OptimizerPlan, settings_of
from skippipe_plugin.engine.parcel import pack_parts
from skippipe_plugin.worker.keep import Keep

SETTINGS = settings_of(SGD([nn.Parameter(torch.zeros(1))], lr=0.5))


def stored(name: str, fit: int, step: int, **fields: Any) -> dict[str, Any]:
    return {"do": "store", "name": name, "fit": fit, "step": step, "lasting": False, **fields}


def holding(value: float) -> Keep:
    """A worker with one parameter, whose gradient is 1 and whose learning rate will be 0.5."""
    keep, block = Keep(), nn.Linear(1, 1, bias=False)
    nn.init.constant_(block.weight, value)
    fields, blobs = pack_blocks({0: block})
    load = {"seed": 0, "compile": None, "first": True, "last": True, "stage": 1}
    load |= {"overlap": 1, "experts": []}
    keep.holdings.load({**load, "blocks": fields}, blobs, torch.device("cpu"))
    plan = OptimizerPlan(SGD, {"lr": 0.5}, (((0, "weight"),),), SETTINGS)
    keep.holdings.build_optimizer(cloudpickle.dumps(plan))
    weight(keep).grad = torch.ones(1, 1)
    return keep


def weight(keep: Keep) -> nn.Parameter:
    return next(iter(keep.holdings.blocks()[0].parameters()))


def finish(step: int) -> tuple[dict[str, Any], list[bytes]]:
    command = {"step": step, "zero": "", "keep": False, "keep_norms": False, "scale": None, "value": None}
    command |= {"lr_factors": []}
    return {"do": "finish", "optimizer_step": command}, [SETTINGS.dumps()]


def test_a_step_that_was_commanded_twice_is_taken_once() -> None:
    keep = holding(2.0)
    keep.obey(*finish(7))
    weight(keep).grad = torch.ones(1, 1)
    keep.obey(*finish(7))
    assert float(weight(keep).detach()) == 1.5
    keep.obey(*finish(8))
    assert float(weight(keep).detach()) == 1.0


def test_what_is_retained_stays_until_all_is_settled() -> None:
    keep = holding(2.0)
    for name in ("base", "tensors", "progress"):
        keep.obey(stored(name, fit=1, step=3), [b"data"])
    keep.obey({"do": "retain"}, [])
    assert not keep.holdings.stages
    keep.obey({"do": "retain"}, [])  # a second driver that is lost on the way changes nothing
    keep.obey(stored("base", fit=1, step=3), [b"newer"])
    summary, _ = keep.obey({"do": "summary"}, [])
    assert summary["blocks"] == [[0]]
    assert set(summary["records"]) == {"base", "tensors", "progress"}
    assert keep.obey({"do": "record", "name": "base"}, [])[1] == [b"data"]
    keep.obey({"do": "settle", "step": 3}, [])
    assert keep.obey({"do": "summary"}, [])[0]["blocks"] == [[]]


def order(stages: list[Any], arriving: dict[int, float], records: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Hold these stages: some blocks come, with one weight each; nothing is kept."""
    weights = pack_tensors({f"{block}\tweight": torch.full((1, 1), value) for block, value in arriving.items()})
    structure = {block: nn.Linear(1, 1, bias=False) for block in arriving}
    parts = {"structure": pack_blocks(structure, values=False), "weights": weights, "gradients": pack_tensors({})}
    entries, blobs = pack_parts({**parts, "records": pack_parts(records)})
    return {"stages": stages, "keep": [], "compile": None, "overlap": 1, "parts": entries}, blobs


def found(keep: Keep) -> dict[int, float]:
    """What a driver that comes anew gathers: each block, from whichever part of what is left."""
    blocks: dict[int, float] = {}
    for part, held in enumerate(keep.obey({"do": "summary"}, [])[0]["blocks"]):
        fields, blobs = keep.obey({"do": "state", "what": "weights", "part": part, "blocks": held}, [])
        blocks |= {int(name[0]): float(tensor) for name, tensor in unpack_tensors(fields["tensors"], blobs).items()}
    return blocks


@pytest.mark.parametrize("times", [1, 2])
def test_blocks_that_go_elsewhere_are_kept_until_all_orders_are_carried_out(times: int) -> None:
    """Whichever of them the driver dies at."""
    keep = holding(2.0)
    for name in ("base", "tensors", "progress"):
        keep.obey(stored(name, fit=1, step=3), [b"data"])
    for _ in range(times):
        keep.arrange(*order([[1, [1], []]], {1: 5.0}, {}), torch.device("cpu"))
    assert list(keep.holdings.blocks()) == [1]
    assert found(keep) == {0: 2.0, 1: 5.0}
    assert set(keep.obey({"do": "summary"}, [])[0]["records"]) == {"base", "tensors", "progress"}
    keep.obey({"do": "retain"}, [])
    keep.obey({"do": "retain"}, [])
    assert found(keep) == {0: 2.0, 1: 5.0}
    assert keep.obey({"do": "record", "name": "base"}, [])[1] == [b"data"]


def test_then_they_are_gone_and_the_records_are_those_that_came() -> None:
    keep = holding(2.0)
    keep.obey(stored("base", fit=1, step=3), [b"old"])
    record = stored("progress", fit=1, step=3), [b"new"]
    keep.arrange(*order([[1, [1], []]], {1: 5.0}, {"progress": record}), torch.device("cpu"))
    keep.obey({"do": "part"}, [])
    assert found(keep) == {1: 5.0}
    assert keep.obey({"do": "summary"}, [])[0]["records"] == {"progress": (1, 3)}
    assert keep.obey({"do": "record", "name": "progress"}, [])[1] == [b"new"]
    keep.obey({"do": "drop"}, [])
    assert found(keep) == {}
    assert not keep.holdings.stages


def test_results_outlast_other_stages() -> None:
    keep = holding(2.0)
    keep.obey({**stored("result1", fit=1, step=3), "lasting": True}, [b"end"])
    keep.obey(stored("base", fit=2, step=0), [b""])
    keep.forget()
    keep.obey({"do": "retain"}, [])
    assert keep.obey({"do": "summary"}, [])[0] == {"blocks": [[0]], "records": {}, "results": [1]}
    assert keep.obey({"do": "record", "name": "result1"}, [])[1] == [b"end"]


def test_objects_travel_with_their_tensors_apart() -> None:
    shared = nn.Parameter(torch.arange(4.0), requires_grad=False)
    entries, blobs = pack_object({"a": shared, "b": [shared, 1], "c": torch.zeros(0, 3)})
    assert [entry[1] for entry in entries] == [[4], [0, 3]]
    found = unpack_object(entries, [bytearray(blob) for blob in blobs])
    assert found["a"] is found["b"][0]
    assert not found["a"].requires_grad
    assert torch.equal(found["a"], shared)
    assert found["c"].shape == (0, 3)
