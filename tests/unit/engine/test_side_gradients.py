"""What a stage brings to side inputs: one sum for all of its blocks, in one message for each backward."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.engine.arguments import HiddenAgain, Packed, SideInput, Template
from skippipe_plugin.engine.call import Ambient, BlockMode, Call, CallSpec, Hop
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.transport import TensorSpec

FORM = TensorSpec((3, 4), torch.float32)
ENTERS = Hop(FORM, requires_grad=True)


class Block(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, hidden: Tensor, *sides: Tensor) -> Tensor:
        return hidden + torch.tanh(super().forward(hidden)) * (1 + sum(sides))


class Inbox:
    """The driver's side."""

    def __init__(self) -> None:
        self.came: list[tuple[int, int, Mapping[int, Tensor]]] = []

    def send_gradients(self, stage: int, microbatch: int, gradients: Mapping[int, Tensor]) -> None:
        self.came.append((stage, microbatch, gradients))


def stage_of(*blocks: nn.Module) -> tuple[Stage, Inbox]:
    stage, inbox = Stage(2, dict(enumerate(blocks)), torch.device("cpu")), Inbox()
    stage.driver_side = inbox
    return stage, inbox


def call_of(
    blocks: Sequence[nn.Module], slots: Sequence[tuple[int, ...]], sides: Sequence[Tensor], *, grad: bool = True
) -> Call:
    """Give each block the side inputs in some slots; those that require a gradient carry it."""
    templates = tuple(Template((None, *map(SideInput, each)), {}, 0) for each in slots)
    modes = tuple(BlockMode((True,), tuple(p.requires_grad for p in block.parameters())) for block in blocks)
    carried = tuple(tuple(slot for slot in each if sides[slot].requires_grad) for each in slots) if grad else ()
    ambient = Ambient(grad, False, ())
    numbers = tuple(range(len(blocks)))
    return Call(CallSpec((), templates, numbers, modes, ambient, carried=carried), tuple(sides), 0)


def alone(
    blocks: Sequence[nn.Module], slots: Sequence[tuple[int, ...]], sides: Sequence[Tensor], entered: Tensor
) -> Any:
    """Return the gradients of what enters, the side inputs and the weights, in one process."""
    leaves = [side.detach().requires_grad_(side.requires_grad) for side in sides]
    leaf = hidden = entered.detach().requires_grad_()
    for block, own in zip(blocks, slots, strict=True):
        hidden = block(hidden, *(leaves[slot] for slot in own))
    weights = [weight for block in blocks for weight in block.parameters()]
    carrying = [each for each in leaves if each.requires_grad]
    return torch.autograd.grad(hidden.cos().sum(), [leaf, *carrying, *weights], allow_unused=True)


@pytest.mark.parametrize("halves", [False, True])
def test_blocks_share_a_leaf_and_microbatches_do_not(halves: bool) -> None:
    blocks = [Block(), Block()]
    slots = [(0, 1), (0, 2)]
    stage, inbox = stage_of(*blocks)
    entered = [torch.randn(3, 4) for _ in range(2)]
    shared = torch.randn(4, requires_grad=True)
    sides = [[shared, torch.randn(3, 4, requires_grad=True) * 2, torch.randn(3, 4)] for _ in range(2)]
    calls = [call_of(blocks, slots, each) for each in sides]
    outputs = [stage.forward(index, calls[index], (entered[index],), ENTERS, ENTERS)[0] for index in range(2)]
    backward = stage.backward_input if halves else stage.backward
    gradients = {}
    for index in (1, 0):
        (gradients[index],) = backward(index, (-outputs[index].sin(),))
        stage.send_gradients(index)
        if halves:
            stage.backward_weight(index)
    assert [(number, index, sorted(found)) for number, index, found in inbox.came] == [(2, 1, [0, 1]), (2, 0, [0, 1])]
    assert shared.grad is None
    expected = [alone(blocks, slots, sides[index], entered[index]) for index in range(2)]
    for _, index, found in inbox.came:
        of_hidden, of_shared, of_own, *_ = expected[index]
        torch.testing.assert_close(gradients[index], of_hidden)
        torch.testing.assert_close(found[0], of_shared)
        torch.testing.assert_close(found[1], of_own)
    weights = [weight for block in blocks for weight in block.parameters()]
    for place, weight in enumerate(weights, start=3):
        torch.testing.assert_close(weight.grad, expected[0][place] + expected[1][place])


class Deaf(Block):
    def forward(self, hidden: Tensor, *_: Tensor) -> Tensor:
        return super().forward(hidden)


@pytest.mark.parametrize("gradient", [torch.ones(3, 4), None])
def test_a_backward_sends_one_message_even_of_nothing(gradient: Tensor | None) -> None:
    """Whoever waits for it knows no better."""
    block: nn.Module = Deaf() if gradient is not None else Block()
    stage, inbox = stage_of(block)
    call = call_of([block], [(0,)], [torch.randn(4, requires_grad=True)])
    stage.forward(0, call, (torch.randn(3, 4),), ENTERS, ENTERS)
    stage.backward(0, (gradient,))
    stage.send_gradients(0)
    assert inbox.came == [(2, 0, {})]


def test_a_stage_whose_blocks_get_none_sends_none() -> None:
    block = Block()
    stage, inbox = stage_of(block)
    call = call_of([block, Block()], [(0,), (1,)], [torch.randn(4), torch.randn(4, requires_grad=True)])
    assert call.spec.carried_by([0]) == ()
    assert call.spec.carried_by([0, 1]) == (1,)
    stage.forward(0, call, (torch.randn(3, 4),), ENTERS, ENTERS)
    stage.backward(0, (torch.ones(3, 4),))
    stage.send_gradients(0)
    assert inbox.came == []


def test_without_gradients_nothing_is_kept() -> None:
    block = Block()
    stage, inbox = stage_of(block)
    side = torch.randn(4, requires_grad=True)
    (output,) = stage.forward(0, call_of([block], [(0,)], [side], grad=False), (torch.randn(3, 4),), ENTERS, ENTERS)
    assert not output.requires_grad
    stage.send_gradients(0)
    assert inbox.came == []


def test_a_step_that_is_given_up_leaves_nothing() -> None:
    block = Block()
    stage, inbox = stage_of(block)
    stage.forward(
        0, call_of([block], [(0,)], [torch.randn(4, requires_grad=True)]), (torch.randn(3, 4),), ENTERS, ENTERS
    )
    stage.forget()
    stage.send_gradients(0)
    assert inbox.came == []


class Changing(Block):
    def forward(self, hidden: Tensor, *sides: Tensor) -> Tensor:
        sides[0].mul_(2)
        return super().forward(hidden, *sides)


def test_a_block_that_changes_one_is_refused() -> None:
    block = Changing()
    stage, _ = stage_of(block)
    call = call_of([block], [(0,)], [torch.randn(4, requires_grad=True)])
    with pytest.raises(SkipPipeError, match="block 0 changes its argument"):
        stage.forward(0, call, (torch.randn(3, 4),), ENTERS, ENTERS)


def test_a_template_knows_its_slots_wherever_they_are() -> None:
    template = Template(
        (None, SideInput(3), [HiddenAgain(), {"a": SideInput(1)}]), {"b": Packed(b"", (SideInput(5), SideInput(1)))}, 0
    )
    assert template.slots() == {1, 3, 5}
