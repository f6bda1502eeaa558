"""A script drops the state of its optimizer, or a part of it, to begin anew: that of the workers goes with it."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import SGD, Adam, Optimizer

from tests.e2e import own_steps as own
from tests.e2e.support import assert_same_run
from tests.grids import slow

from .test_optimizers import assert_same_state
from .test_own_steps import Model, fit

Drop = Callable[[Optimizer, Model], Any]


def replace(optimizer: Optimizer, module: Model) -> None:
    optimizer.state = defaultdict(dict)


def clear(optimizer: Optimizer, module: Model) -> None:
    optimizer.state.clear()


def pop_one(optimizer: Optimizer, module: Model) -> None:
    weight = module.blocks[1].linear.weight
    entry = optimizer.state.pop(weight, None)
    module.seen.append(float(next(value for value in entry.values() if value.ndim).norm()))
    assert len(module.trainer.optimizers[0].state_dict()["state"]) == len(list(module.parameters())) - 1
    assert optimizer.state.pop(weight, None) is None
    with pytest.raises(KeyError):
        del optimizer.state[weight]


def delete_all(optimizer: Optimizer, module: Model) -> None:
    for parameter in module.parameters():
        del optimizer.state[parameter]


def replace_and_write(optimizer: Optimizer, module: Model) -> None:
    state = optimizer.state_dict()["state"]
    optimizer.state = defaultdict(dict)
    for number, parameter in enumerate(module.parameters()):
        if number % 2:
            optimizer.state[parameter] = state[number]


class Dropping(Model):
    drop: Drop
    when = 1

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        if index == self.when:
            type(self).drop(self.trainer.optimizers[0], self)


@pytest.mark.parametrize(
    "make", [slow(lambda m: SGD(m.parameters(), lr=0.02, momentum=0.9)), lambda m: Adam(m.parameters())]
)
@pytest.mark.parametrize("when", [1, 3], ids=["in the run", "at its end"])
@pytest.mark.parametrize("drop", [slow(replace), clear, pop_one, slow(delete_all), replace_and_write])
def test_the_state_of_the_workers_is_dropped_too(drop: Drop, when: int, make: Any) -> None:
    model = type("Dropping", (Dropping,), {"drop": staticmethod(drop), "when": when})
    expected, found = fit(make, 1, model), fit(make, 3, model)
    assert_same_run(found, expected)
    assert found.module.seen == pytest.approx(expected.module.seen, rel=1e-4)
    sort_state(expected.trainer.optimizers[0])
    assert_same_state(found.trainer.optimizers[0], expected.trainer.optimizers[0])


def sort_state(optimizer: Optimizer) -> None:
    """Bring what was made again to its place: a pipeline's is always in the order of the parameters."""
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.state = defaultdict(dict, {each: optimizer.state[each] for each in members if each in optimizer.state})


@pytest.mark.parametrize("cleared", [True, False])
def test_a_step_that_drops_the_state_itself(cleared: bool) -> None:
    def make(module: Any) -> Optimizer:
        return own.Restarting(module.parameters(), lr=0.02, momentum=0.9, cleared=cleared)

    expected, found = fit(make, 1), fit(make, 3)
    assert_same_run(found, expected)
    assert_same_state(found.trainer.optimizers[0], expected.trainer.optimizers[0])
