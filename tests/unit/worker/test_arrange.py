"""Blocks that move between workers train on as if they had stayed: weights, buffers, gradients, optimizer state."""

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from skippipe_plugin.engine.classes import fingerprints
from skippipe_plugin.engine.control.commands import Arrange, Load, Merge
from skippipe_plugin.engine.control.values import Opening, Stand, StepOrder
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.handover import pack_blocks
from skippipe_plugin.engine.optimizer import OptimizerPlan, settings_of
from skippipe_plugin.engine.parcel import Parcel
from skippipe_plugin.engine.wire import encode_optimizer_state
from skippipe_plugin.worker.arrange import arrange
from skippipe_plugin.worker.holdings import Holdings

CPU = torch.device("cpu")
NUM_BLOCKS = 6
OPTIMIZERS = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=0.05, amsgrad=True),
    "rmsprop": lambda parameters: RMSprop(parameters, lr=0.02, momentum=0.5, centered=True),
}


class Block(nn.Module):
    """With a frozen parameter, an unused one, a tie inside the block, and both kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.linear.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            self.steps += 1
            self.mean.lerp_(hidden.mean(0), 0.1)
        return hidden + torch.tanh(self.tied(self.linear(hidden))) * self.frozen


def load(stages: dict[int, Sequence[int]], blocks: Sequence[nn.Module], plan: bytes) -> Holdings:
    holdings = Holdings()
    for stage, own in stages.items():
        entries, blobs = pack_blocks({index: blocks[index] for index in own})
        first, last = stage == min(stages), stage == max(stages)
        holdings.load(Load(stage, 0, first, last, 1, entries, {}, [], b"", blobs), CPU)
    holdings.build_optimizer(plan)
    return holdings


def plan_of(optimizer: Optimizer, blocks: Sequence[nn.Module]) -> bytes:
    names = {id(p): (index, name) for index, block in enumerate(blocks) for name, p in block.named_parameters()}
    groups = tuple(tuple(names[id(p)] for p in group["params"]) for group in optimizer.param_groups)
    return pickle.dumps(OptimizerPlan(type(optimizer), dict(optimizer.defaults), groups, settings_of(optimizer)))


def order(source: Holdings, target: Holdings, stages: dict[int, Sequence[int]], plan: bytes, structure: nn.Module):
    """What the driver sends: ``stages`` out of what ``target`` has and ``source`` gives."""
    wanted = [block for blocks in stages.values() for block in blocks]
    moving = [block for block in wanted if block not in target.blocks()]
    weights, gradients = source.state("weights", moving), source.state("gradients", moving)
    optimizer = source.state("optimizer", moving)
    parts, blobs = Parcel(
        structure=pack_blocks({block: copy.deepcopy(structure) for block in moving}, values=False),
        weights=(weights.tensors, weights.blobs),
        gradients=(gradients.tensors, gradients.blobs),
        optimizer=(optimizer.tensors, optimizer.blobs),
        attributes=([], []),
        plan=plan,
        records={},
    ).pack()
    keep = [block for block in wanted if block not in moving]
    fields = Arrange([(stage, own, []) for stage, own in stages.items()], keep, {}, 1, [], [], Stand(), parts, b"", [])
    return fields, Parcel.unpack(parts, [bytes(blob) for blob in blobs])  # as after the wire: memory of its own


def run(holders: Sequence[Holdings], optimizer: Optimizer, seed: int, *, step: bool) -> None:
    """One batch through all blocks in order; perhaps an optimizer step after it."""
    hidden = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    for holdings in holders:
        holdings.begin_step(Opening("training", [0], True, False, []))
    blocks = {index: block for holdings in holders for index, block in holdings.blocks().items()}
    for index in sorted(blocks):
        hidden = blocks[index](hidden)
    hidden.square().mean().backward()
    for holdings in holders:
        holdings.window.close()
        holdings.merge(Merge(1.0, "", [], None))
    if step:
        values = settings_of(optimizer).dumps()
        for holdings in holders:
            holdings.step_optimizer(StepOrder(None, None, "", False, True, []), values)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moved_blocks_train_on_as_if_they_had_stayed(name: str, times: int, used: bool) -> None:
    """The move comes in the middle of an accumulation; an order that is repeated changes nothing.

    A worker that was used before has taken optimizer steps of another run.
    """
    torch.manual_seed(0)
    blocks = [Block() for _ in range(NUM_BLOCKS)]
    make: Callable[..., Optimizer] = OPTIMIZERS[name]
    optimizer = make([{"params": block.parameters(), "lr": 0.01 * (i + 1)} for i, block in enumerate(blocks)])
    plan = plan_of(optimizer, blocks)
    reference = load({1: range(NUM_BLOCKS)}, blocks, plan)
    first, second, third = load({1: range(3)}, blocks, plan), load({2: range(3, 6)}, blocks, plan), Holdings()
    if used:
        third = load({1: range(2)}, [Block() for _ in range(2)], plan_of(make(blocks[0].parameters()), blocks[:1]))
        run([third], make(blocks[0].parameters()), 0, step=True)
    for seed in range(4):
        run([reference], optimizer, seed, step=seed % 2 == 1)
        run([first, second], optimizer, seed, step=seed % 2 == 1)
    run([reference], optimizer, 4, step=False)
    run([first, second], optimizer, 4, step=False)

    orders = [
        (third, order(second, third, {3: [4, 5]}, plan, blocks[0])),
        (second, order(first, second, {2: [2, 3]}, plan, blocks[0])),
        (first, order(second, first, {1: [0, 1]}, plan, blocks[0])),
    ]
    for holdings, (fields, parts) in orders * times:
        arrange(holdings, fields, parts, CPU)
    assert [list(holdings.blocks()) for holdings in (first, second, third)] == [[0, 1], [2, 3], [4, 5]]
    assert third.blocks()[4].tied.weight is third.blocks()[4].linear.weight
    assert not third.blocks()[4].frozen.requires_grad

    for seed in range(5, 9):
        run([reference], optimizer, seed, step=seed % 2 == 1)
        run([first, second, third], optimizer, seed, step=seed % 2 == 1)
    expected = reference.blocks()
    for holdings in (first, second, third):
        for index, block in holdings.blocks().items():
            torch.testing.assert_close(
                dict(block.named_parameters()), dict(expected[index].named_parameters()), rtol=0, atol=0
            )
            torch.testing.assert_close(
                dict(block.named_buffers()), dict(expected[index].named_buffers()), rtol=0, atol=0
            )
            assert int(block.steps) == 9
        own = holdings.optimizer_state()
        torch.testing.assert_close(own, {key: reference.optimizer_state()[key] for key in own}, rtol=0, atol=0)


def test_blocks_that_come_later_are_of_the_drivers_classes() -> None:
    """As at the first load: a worker that takes over may have imported another class."""
    blocks = {0: nn.Linear(3, 3)}
    parcel = Parcel(
        structure=pack_blocks(blocks, values=False),
        weights=([], []),
        gradients=([], []),
        optimizer=encode_optimizer_state({}),
        attributes=([], []),
        plan=None,
        records={},
    )
    parts, blobs = parcel.pack()
    fields = Arrange([(1, [0], [])], [], fingerprints(blocks.values()), 1, [], [], Stand(), parts, b"", blobs)
    arrange(Holdings(), fields, parcel, CPU)
    patched = {owner: dict(entries) for owner, entries in fingerprints(blocks.values()).items()}
    patched["torch.nn.modules.linear:Linear"]["forward"] = "another"
    with pytest.raises(SkipPipeError, match=r"Linear\.forward was patched"):
        arrange(Holdings(), replace(fields, classes=patched), parcel, CPU)
