"""What a stage is asked about its blocks leaves no trace: it was a question, and not a step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.engine.arguments import Template
from skippipe_plugin.engine.call import Ambient, BlockMode, Call, CallSpec
from skippipe_plugin.engine.independence import Parts
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.transport import TensorSpec


class Counting(nn.Module):
    """Changes a buffer in place, puts another tensor in the place of one, and counts in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("last", torch.ones(4), persistent=False)
        self.calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.seen += h.detach().mean(0)
        self.last = h.detach()[0].clone()
        self.calls += 1
        return h * 2


class Failing(Counting):
    def forward(self, h: Tensor) -> Tensor:
        super().forward(h)
        torch.rand(3)
        raise ValueError("not today")


BLOCKS: dict[str, Any] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm that averages": lambda: nn.BatchNorm1d(4, momentum=None),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(0, (2, 3)), nn.InstanceNorm1d(3, track_running_stats=True)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)),
    "counting": Counting,
}


def call_of(module: nn.Module, *, grad: bool) -> Call:
    mode = BlockMode(
        tuple(child.training for child in module.modules()), tuple(p.requires_grad for p in module.parameters())
    )
    return Call(CallSpec((), (Template((None,), {}, 0),), (0,), (mode,), Ambient(grad, False, ())), (), 0)


def trace(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    gradients = {f"{name}.grad": parameter.grad for name, parameter in module.named_parameters()}
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str))}
    return copy.deepcopy({**tensors, **gradients, **plain, "rng": torch.get_rng_state()})


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_probe_leaves_no_trace(name: str, grad: bool) -> None:
    module = BLOCKS[name]()
    stage, call = Stage(1, {0: module}, torch.device("cpu")), call_of(module, grad=grad)
    module(torch.randn(6, 4))  # something there to be lost
    before = trace(module)
    found = stage.probe(0, call, TensorSpec((6, 4), torch.float32))
    assert found.output.shape[-1] == 4
    assert_same(trace(module), before)
    module(torch.randn(6, 4))
    assert name == "dropout" or any(not torch.equal(value, before[key]) for key, value in module.named_buffers()), (
        "the block writes nothing, so this shows nothing"
    )


@pytest.mark.parametrize("name", ["batch norm", "counting", "dropout"])
def test_a_question_about_parts_leaves_no_trace(name: str) -> None:
    module = BLOCKS[name]()
    stage, call = Stage(1, {0: module}, torch.device("cpu")), call_of(module, grad=False)
    before = trace(module)
    stage.difference_of_parts(0, call, TensorSpec((6, 4), torch.float32), Parts((call, call), (4, 2), 0, 0))
    assert_same(trace(module), before)


def test_a_probe_that_fails_leaves_no_trace() -> None:
    module = Failing()
    stage, call = Stage(1, {0: module}, torch.device("cpu")), call_of(module, grad=True)
    before = trace(module)
    with pytest.raises(ValueError, match="not today"):
        stage.probe(0, call, TensorSpec((6, 4), torch.float32))
    assert_same(trace(module), before)
