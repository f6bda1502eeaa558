"""What is known of the forms that blocks make, and when it must be asked."""

import dataclasses

import torch
from torch import nn

from skippipe_plugin.driver.capture.shapes import Mode, ShapeBook
from skippipe_plugin.engine.probes import Probe
from skippipe_plugin.engine.transport import TensorSpec

FULL, LOW = TensorSpec((2, 4), torch.float32), TensorSpec((2, 4), torch.bfloat16)
TRAINING, EVALUATION = Mode(True, True), Mode(False, False)
LOWERED = Mode(True, True, "autocast")


class Asked:
    """Answers what a block makes of its input, and counts how often it is asked."""

    def __init__(self, *outputs: TensorSpec) -> None:
        self.outputs, self.count = list(outputs), 0

    def __call__(self) -> Probe:
        self.count += 1
        fields = {field.name: None for field in dataclasses.fields(Probe)}
        return Probe(**fields | {"output": self.outputs.pop(0)})  # type: ignore[arg-type]


def book() -> ShapeBook:
    return ShapeBook([nn.Linear(4, 4) for _ in range(2)])


def test_a_block_that_keeps_a_dtype_is_asked_about_others() -> None:
    """Promotion: a block that adds float32 to bfloat16 makes float32 of both."""
    shapes, asked = book(), Asked(FULL, FULL)
    assert shapes.output(1, FULL, TRAINING, asked, ask=True).output == FULL
    assert shapes.output(0, LOW, TRAINING, asked, ask=True).output == FULL
    for _ in range(2):
        assert shapes.output(0, LOW, TRAINING, asked, ask=True).output == FULL
        assert shapes.output(1, TensorSpec((1, 4), torch.float32), TRAINING, asked, ask=True).output.shape == (1, 4)
    assert asked.count == 2


def test_what_decides_on_dtypes_is_asked_about() -> None:
    shapes, asked = book(), Asked(FULL, LOW)
    assert shapes.output(0, FULL, TRAINING, asked, ask=True).output == FULL
    assert shapes.output(0, FULL, LOWERED, asked, ask=True).output == LOW
    assert shapes.output(1, FULL, TRAINING, asked, ask=True).output == FULL
    assert shapes.output(1, FULL, LOWERED, asked, ask=True).output == LOW


def test_within_a_step_what_is_like_it_answers() -> None:
    shapes, asked = book(), Asked(FULL, LOW)
    shapes.output(0, FULL, TRAINING, asked, ask=True)
    shapes.output(0, FULL, LOWERED, asked, ask=True)
    evaluated = Mode(False, False, "autocast")
    assert shapes.output(0, FULL, evaluated, asked, ask=False).output == LOW
    assert shapes.output(0, FULL, EVALUATION, asked, ask=False).output == FULL
    other = TensorSpec((3, 4), torch.float64)
    assert shapes.output(0, other, EVALUATION, asked, ask=False).output == other


def test_it_is_settled_where_all_keep_their_form() -> None:
    shapes = book()
    assert not shapes.is_settled([True, True])
    shapes.output(0, FULL, TRAINING, Asked(FULL), ask=True)
    assert shapes.is_settled([True, True])
    assert not shapes.is_settled([True, False])


def test_each_form_is_asked_about_where_orders_in_memory_are_others() -> None:
    """Convolutions choose by sizes which order their results have, where weights or input are channels last."""
    shapes, last = book(), dataclasses.replace(FULL, order=(1, 0))
    one = TensorSpec((1, 4), torch.float32)
    asked = Asked(FULL, last, FULL, one)
    assert shapes.output(0, FULL, TRAINING, asked, ask=True).output == FULL
    assert shapes.output(0, one, TRAINING, asked, ask=True).output == one
    assert shapes.output(0, last, TRAINING, asked, ask=True).output == last
    assert not shapes.is_settled([True, True])
    assert shapes.output(0, dataclasses.replace(last, shape=(3, 4)), TRAINING, asked, ask=True).output == FULL
    assert shapes.output(1, one, TRAINING, asked, ask=True).output == one
    assert asked.count == 4


def test_weights_in_another_order_are_asked_about() -> None:
    blocks = [nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)]  # type: ignore[call-overload]
    shapes = ShapeBook(blocks)
    shapes.output(0, FULL, TRAINING, Asked(FULL), ask=True)
    assert not shapes.is_settled([True])
