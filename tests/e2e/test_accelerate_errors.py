"""What cannot work under accelerate says so with the way out, and leaves the accelerator fit for the next batch."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

from skippipe_plugin.accelerate import SkipPipeConfig
from skippipe_plugin.driver.capture.batches import BatchError
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import PartitionError
from tests.e2e import loops
from tests.e2e.loops import Classifier
from tests.e2e.support import DEVICE

X, Y = (column.to(DEVICE) for column in loops.samples(8).tensors)


@pytest.fixture
def current() -> Iterator[Accelerator]:
    with loops.accelerator("pipeline") as made:
        yield made


def prepared(current: Accelerator) -> tuple[Any, Any]:
    model = Classifier()
    return current.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def step(current: Accelerator, model: nn.Module, optimizer: Any) -> None:
    """The next batch trains."""
    before = model.state_dict()["blocks.0.mlp.0.weight"].clone()
    current.backward(functional.cross_entropy(model(X), Y))
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(before, model.state_dict()["blocks.0.mlp.0.weight"])


def test_a_model_without_blocks(current: Accelerator) -> None:
    with pytest.raises(PartitionError, match="Found no stack of blocks"):
        current.prepare(nn.Linear(4, 4))
    step(current, *prepared(current))


def test_fewer_blocks_than_stages() -> None:
    with (
        loops.accelerator("pipeline", num_stages=5) as current,
        pytest.raises(PartitionError, match="4 blocks cannot fill 5"),
    ):
        prepared(current)


def test_a_second_model_and_a_second_optimizer(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    with pytest.raises(SkipPipeError, match=r"second model .* evaluation_mode=True"):
        current.prepare(Classifier())
    teacher = current.prepare_model(Classifier(), evaluation_mode=True)
    assert teacher(X).requires_grad
    with pytest.raises(SkipPipeError, match="second optimizer"):
        current.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    step(current, model, optimizer)


def test_two_calls_for_one_backward_that_only_a_later_batch_makes(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    current.backward(model(X, labels=Y)["loss"])
    optimizer.zero_grad()
    first, second = (model(X, labels=Y)["loss"] for _ in range(2))
    with pytest.raises(SkipPipeError, match="an earlier call of the model"):
        current.backward(first + second)
    optimizer.zero_grad()
    step(current, model, optimizer)


@pytest.mark.parametrize("inside", [True, False])
def test_two_backwards_for_one_call(current: Accelerator, inside: bool) -> None:
    model, optimizer = prepared(current)
    loss = model(X, labels=Y)["loss"] if inside else functional.cross_entropy(model(X), Y)
    current.backward(loss, retain_graph=True)
    with pytest.raises(SkipPipeError, match="added already"):
        current.backward(loss)
    optimizer.zero_grad()
    step(current, model, optimizer)


def test_backward_through_other_outputs_than_the_loss(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    outputs = model(X, labels=Y)
    with pytest.raises(SkipPipeError, match="Use the returned loss alone; call the model without labels"):
        current.backward(outputs["loss"] + outputs["logits"].square().mean())
    optimizer.zero_grad()
    step(current, model, optimizer)


def test_backward_without_training(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    loss = functional.cross_entropy(model.eval()(X), Y)
    with pytest.raises(SkipPipeError, match=re.escape("Call model.train()")):
        current.backward(loss)
    step(current, model.train(), optimizer)


def test_batches_that_are_dropped(current: Accelerator) -> None:
    """A loop may drop a loss, evaluate or save before it goes on."""
    model, optimizer = prepared(current)
    step(current, model, optimizer)
    dropped = functional.cross_entropy(model(X), Y)
    with torch.no_grad():
        model(X)
    current.backward(dropped)  # the loop has not dropped it after all
    optimizer.zero_grad()
    functional.cross_entropy(model(X), Y)
    model.state_dict()
    functional.cross_entropy(model(X), Y)
    optimizer.step()
    model(X, labels=Y)
    step(current, model, optimizer)


def test_clipping_a_part_of_the_blocks(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    current.backward(functional.cross_entropy(model(X), Y))
    with pytest.raises(SkipPipeError, match=re.escape("pass model.parameters()")):
        current.clip_grad_norm_(model.blocks[0].parameters(), 1.0)
    assert float(current.clip_grad_norm_(model.head.parameters(), 1e-3)) > 1e-3
    optimizer.step()
    step(current, model, optimizer)


def test_batches_that_cannot_be_cut() -> None:
    with loops.accelerator("pipeline", microbatches="batch") as current:
        model, optimizer = prepared(current)
        with pytest.raises(BatchError, match="must share their first dimension"):
            model(X, labels=Y[:3])
        with pytest.raises(BatchError, match="holds no tensor or list to cut along"):
            model(1.0)
        step(current, model, optimizer)


def test_batches_that_the_model_does_not_take(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    with pytest.raises(ValueError, match="Expected input batch_size"):
        model(X, labels=Y[:3])
    with pytest.raises(TypeError, match="must be Tensor"):
        model(1.0)
    step(current, model, optimizer)


def test_an_error_in_the_model_has_its_own_traceback(current: Accelerator) -> None:
    model, optimizer = prepared(current)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(8, 3).to(DEVICE))
    step(current, model, optimizer)


def test_settings_that_cannot_be() -> None:
    for wrong, message in {
        "skip_ratio": "out of range",
        "num_microbatches": "out of range",
        "num_stages": "out of range",
        "schedule": "unknown",
    }.items():
        with pytest.raises(ValueError, match=message), loops.accelerator("plain"):
            SkipPipeConfig(**{wrong: -1 if wrong != "schedule" else "zigzag"})
    with pytest.raises(ValueError, match="one process drives"):
        SkipPipeConfig(drivers=2)


def test_settings_come_from_arguments_the_environment_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text("num_stages: 3\nskip_ratio: {0: 0.0, 100: 0.25}\npaths:\n  max_jump: 2\nreplicas: 2\n")
    environment = {
        "SKIPPIPE_CONFIG_FILE": str(file),
        "SKIPPIPE_NUM_STAGES": "4",
        "SKIPPIPE_RECOVERY": "{spares: 2}",
        "SKIPPIPE_SECRET": "not a setting",
    }
    config = SkipPipeConfig.from_environment(environment, replicas=1)
    assert (config.num_stages, config.replicas, config.paths.max_jump) == (4, 1, 2)
    assert config.skip_ratio == {0: 0.0, 100: 0.25}
    assert config.recovery is not None
    assert config.recovery.spares == 2
    file.write_text("skip_ration: 0.25")
    with pytest.raises(ValueError, match=r"there is no setting 'skip_ration' of .*; did you mean 'skip_ratio'"):
        SkipPipeConfig.from_environment(environment)
    with pytest.raises(ValueError, match="there is no setting 'jump' of paths"):
        SkipPipeConfig.from_environment({"SKIPPIPE_PATHS": "{jump: 2}"})
    with pytest.raises(ValueError, match="cannot be read"):
        SkipPipeConfig.from_environment({"SKIPPIPE_CONFIG_FILE": str(tmp_path / "none.yaml")})
