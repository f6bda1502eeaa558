"""What comes to the host on its way goes to the device that it belongs to; meta stands for one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, SumMetric

from skippipe_plugin.driver.capture.rewind import metric_states, rewinder, set_metric_states
from skippipe_plugin.driver.optimizer import to_device
from skippipe_plugin.engine.handover import pack_object, unpack_object

META = torch.device("meta")


def stepped(**settings: Any) -> torch.optim.AdamW:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], **settings)
    parameter.grad = torch.ones(2)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(("settings", "counts_there"), [({}, False), ({"fused": True}, True)])
def test_steps_are_counted_on_the_host_unless_they_run_on_the_device(settings: dict, counts_there: bool) -> None:
    optimizer = stepped(**settings)
    (state,) = optimizer.state.values()
    to_device(optimizer, META)
    where = {name: value.device.type for name, value in state.items() if isinstance(value, Tensor)}
    assert where == {"step": "meta" if counts_there else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_lists_in_an_optimizers_state_are_moved() -> None:
    optimizer = stepped()
    (state,) = optimizer.state.values()
    state["before"] = [torch.ones(2), {"last": torch.ones(2)}]
    to_device(optimizer, META)
    first, second = state["before"]
    assert first.device == second["last"].device == META


@pytest.mark.parametrize("on_host", [False, True])
def test_counts_of_metrics_that_have_travelled(on_host: bool) -> None:
    module = nn.Module()
    module.seen, module.every = SumMetric(), CatMetric(compute_on_cpu=on_host)
    module.seen.update(3.0)
    module.every.update(torch.ones(2))
    states = unpack_object(*pack_object(metric_states(module)))
    module.seen.to("meta")
    module.every.to("meta")
    set_metric_states(module, states)
    assert isinstance(module.seen, SumMetric)
    assert isinstance(module.every, CatMetric)
    assert module.seen.sum_value.device == META
    assert [each.device.type for each in module.every.value] == ["cpu" if on_host else "meta"]


def test_counts_that_are_rewound_stay() -> None:
    module = nn.Module()
    module.seen = SumMetric()
    module.seen.update(3.0)
    rewind = rewinder(module)
    module.seen.update(4.0)
    rewind()
    assert module.seen.compute() == 3
