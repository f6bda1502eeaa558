"""What of the driver's state is sent when: trained parameters always, frozen ones when they have changed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from skippipe_plugin.driver.mirror import DriverState


class Local:
    """The state of an optimizer without remote parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.local_state_dict = optimizer.state_dict

    def numbers(self) -> dict[tuple[int, str], int]:
        return {(0, "weight"): 3}


def model() -> nn.Module:
    parts = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8), "frozen": nn.Linear(4, 4)})
    parts["head"].weight = parts["embedding"].weight
    parts["frozen"].requires_grad_(False)
    parts["norm"] = nn.BatchNorm1d(4, affine=False)
    parts["remote"] = nn.Linear(4, 4, device="meta")
    return parts


def test_parameters_are_told_apart() -> None:
    parts = model()
    optimizer = AdamW([p for p in parts.parameters() if not p.is_meta])
    parts["head"](parts["embedding"](torch.tensor([1]))).sum().backward()
    optimizer.step()
    state = DriverState(parts, Local(optimizer))
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(state.others()) == {"frozen.weight", "frozen.bias"} | buffers
    trained = state.trained()
    assert set(trained["parameters"]) == {"embedding.weight", "head.weight", "head.bias"}
    assert trained["parameters"]["embedding.weight"] is trained["parameters"]["head.weight"]
    assert set(trained["optimizer"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert trained["numbers"] == {(0, "weight"): 3}


def test_buffers_are_sent_again_when_they_have_changed_and_put_back() -> None:
    parts = model()
    state = DriverState(parts, Local(AdamW(parts["head"].parameters())))
    before = {name: tensor.clone() for name, tensor in state.others().items()}
    state.remember_others()
    parts["norm"](torch.randn(5, 4))
    state.others()  # sent to a worker that takes over; the other one has those of the start
    assert set(state.changed()) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    state.put(before)
    assert int(parts["norm"].num_batches_tracked) == 0
    torch.testing.assert_close(parts["norm"].running_var, torch.ones(4))


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(0.9),
        lambda weight: weight.data.mul_(0.9),  # which autograd does not count
        lambda weight: setattr(weight, "data", weight.data * 0.9),
    ],
)
def test_a_frozen_parameter_that_user_code_changes_is_noticed(change: Callable[[Tensor], object]) -> None:
    parts = model()
    state = DriverState(parts, Local(AdamW(parts["head"].parameters())))
    state.remember_others()
    assert not state.changed()
    with torch.no_grad():
        change(parts["frozen"].weight)
    assert set(state.changed()) == {"frozen.weight"}
    parts["frozen"].bias.requires_grad_(True)
    assert "frozen.bias" in state.trained()["parameters"]
    parts["head"].bias.requires_grad_(False)  # frozen in the middle of the fit: it was not among the frozen
    assert set(state.changed()) == {"frozen.weight", "head.bias"}
