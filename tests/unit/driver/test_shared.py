"""What blocks share is found, sent where it lacks, and its gradients come together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.driver.shared import SharedTensors, Values
from skippipe_plugin.engine.control.answers import Done
from skippipe_plugin.engine.control.commands import Share
from skippipe_plugin.engine.control.values import Writes
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.handover import pack_gradients, pack_tensors
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.wire import block_tensors
from skippipe_plugin.worker.copies import SharedCopies

HOST = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.other(self.linear(hidden))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 4), nn.ModuleList(Block() for _ in range(4))


class Workers:
    def __init__(self) -> None:
        self.formed = 0
        self.sent: list[Values] = []

    def share(self, values: Values) -> None:
        self.sent.append(values)


def found(model: Model, remote: Any = range(4)) -> tuple[SharedTensors, Workers]:
    workers = Workers()
    shared = SharedTensors(workers)
    shared.find(model, list(model.blocks), set(remote), [f"blocks.{i}" for i in range(4)], HOST)
    return shared, workers


def nothing(model: Model) -> None: ...


def within_a_block(model: Model) -> None:
    model.blocks[1].other.weight = model.blocks[1].linear.weight


def a_second_name(model: Model) -> None:
    model.layers = model.blocks


def a_parameter(model: Model) -> None:
    model.blocks[3].linear.weight = model.blocks[0].linear.weight


def with_the_rest(model: Model) -> None:
    model.blocks[2].linear = model.embed


def one_memory(model: Model) -> None:
    model.blocks[2].linear.weight = nn.Parameter(model.blocks[1].linear.weight.data)


def a_buffer_of_a_parameter(model: Model) -> None:
    model.blocks[2].register_buffer("table", model.embed.weight.detach()[1])


def one_block(model: Model) -> None:
    model.blocks[1] = model.blocks[2] = model.blocks[3] = model.blocks[0]


@pytest.mark.parametrize(
    ("change", "remote", "copies"),
    [
        (nothing, range(4), []),
        (within_a_block, range(4), []),
        (a_second_name, range(4), []),
        (a_parameter, range(4), ["0\tlinear.weight", "3\tlinear.weight"]),
        (a_parameter, [1, 2, 3], ["3\tlinear.weight"]),
        (a_parameter, [1, 2], []),
        (with_the_rest, range(4), ["2\tlinear.bias", "2\tlinear.weight"]),
        (one_memory, range(4), ["1\tlinear.weight", "2\tlinear.weight"]),
        (a_buffer_of_a_parameter, range(4), ["2\ttable"]),
        (one_block, [3], [f"3\t{name}.{kind}" for name in ("linear", "other") for kind in ("bias", "weight")]),
    ],
)
def test_what_is_shared(change: Callable[[Model], None], remote: Any, copies: list[str]) -> None:
    model = Model()
    change(model)
    shared, _ = found(model, remote)
    assert sorted(shared.copies) == copies


def test_without_values_it_is_refused() -> None:
    model = Model()
    model.blocks[0].linear = model.blocks[1].linear = nn.Linear(4, 4, device="meta")
    with pytest.raises(SkipPipeError, match=r"blocks\.0\.linear\.weight is also in other blocks .* no values yet"):
        found(model)


def test_it_is_sent_when_it_was_written_and_to_who_is_new() -> None:
    model = Model()
    a_parameter(model)
    shared, workers = found(model)
    weight = model.blocks[0].linear.weight
    writes: list[tuple[Callable[[], Any], int]] = [
        (lambda: None, 1),  # names, and values of another run
        (lambda: None, 0),
        (lambda: weight.data.add_(1), 1),
        (lambda: weight.detach().mul_(2), 1),
        (lambda: setattr(workers, "formed", 1), 1),
        (lambda: setattr(workers, "formed", -1), 0),
    ]
    for write, num in writes:
        write()
        workers.sent.clear()
        shared.flush()
        assert len(workers.sent) == num
        for values in workers.sent:
            assert [(list(names), value.equal(weight)) for names, value in values.values()] == [
                (["0\tlinear.weight", "3\tlinear.weight"], True)
            ]


def test_gradients_of_copies_come_together() -> None:
    model = Model()
    a_parameter(model)
    one_block_of_two = {0: Block(), 1: Block(), 3: Block()}
    stages = {1: Stage(1, {0: one_block_of_two[0], 1: one_block_of_two[1]}, HOST), 2: Stage(2, {3: Block()}, HOST)}
    own = block_tensors({block: module for stage in stages.values() for block, module in stage.blocks.items()})
    copies, names, weight = SharedCopies(), ["0\tlinear.weight", "3\tlinear.weight"], model.blocks[0].linear.weight
    copies.overwrite(Share({"0": names}, *pack_tensors({"0": weight.detach()})), own)
    assert all(own[name].equal(weight) for name in names)
    for factor, name in enumerate(("0\tlinear.weight", "3\tlinear.weight", "1\tlinear.weight"), start=1):
        own[name].grad = torch.full((4, 4), float(factor))
    gathered = copies.gather(stages, own, skip=())
    assert [own[name].grad is None for name in own].count(False) == 1, "what is not shared stays"
    shared, _ = found(model)
    weight.grad = torch.ones(4, 4)
    shared.add_gradients([gathered.added_to(Done(0, [], Writes(), {}))])
    assert weight.grad.eq(4.0).all()
    own[names[0]].grad = own[names[1]].grad = torch.ones(4, 4)
    assert copies.gather(stages, own, skip={2}).gradients["0"].eq(1.0).all(), "of a replica's stage that one tells"


@pytest.mark.parametrize("write", [lambda w: w.data.add_(1), lambda w: w.detach().mul_(1.0)])
def test_a_copy_that_its_block_has_written_is_refused(write: Callable[[Tensor], Any]) -> None:
    stage, copies = Stage(1, {0: Block()}, HOST), SharedCopies()
    own = block_tensors(stage.blocks)
    weight = own["0\tlinear.weight"]
    copies.overwrite(Share({"0": ["0\tlinear.weight"]}, *pack_tensors({"0": weight.detach().clone()})), own)
    write(weight)
    with pytest.raises(SkipPipeError, match=r"writes linear\.weight"):
        copies.gather({1: stage}, own, ())


def test_sparse_gradients_travel() -> None:
    model = Model()
    a_parameter(model)
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), torch.ones(3, 4), (4, 4))
    entries, blobs = pack_gradients({"0": rows})
    shared, _ = found(model)
    for _ in range(2):
        shared.add_gradients([Done(0, [], Writes(), {}, entries, blobs=blobs)])
    gradient = model.blocks[0].linear.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.to_dense().sum(1).tolist() == [0.0, 16.0, 0.0, 8.0]
