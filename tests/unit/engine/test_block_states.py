"""What a step leaves in blocks is taken back when it does not count, and found again when it runs once more."""

import copy
import weakref

import pytest
import torch
from torch import nn

from skippipe_plugin.engine.attributes import BlockWatch
from skippipe_plugin.engine.block_states import BlockStates
from skippipe_plugin.engine.control.values import States
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.stage import Stage


class Counts(nn.Module):
    """Counts in place, by another tensor, in attributes, in a parameter; not all of it changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("total", torch.zeros(1))
        self.register_buffer("still", torch.ones(2))
        self.register_buffer("none", None)
        self.book = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.seen: list[int] = []
        self.num = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total = self.total + len(x)
        self.book.data += 1
        self.seen.append(len(x))
        self.num += 1
        self.last = float(x.mean())
        return self.norm(x)


def state(module: Counts) -> object:
    tensors = {name: tensor.tolist() for name, tensor in module.state_dict().items()}
    return tensors, list(module.seen), module.num, getattr(module, "last", None)


@pytest.fixture
def module() -> Counts:
    torch.manual_seed(0)
    return Counts()


class Runs:
    """Runs steps of a block as a stage does, which looks at its attributes."""

    def __init__(self, module: Counts) -> None:
        self.module = module
        self.stage = Stage(1, {0: module}, torch.device("cpu"))
        self.states = BlockStates({1: self.stage})

    def begin(self, order: States | None = None, *, repeats: bool = False) -> None:
        if order is not None:
            order = States(order.note, order.start, order.oldest, [(0, "book")])
        self.states.begin(order, repeats=repeats, may_repeat=order is None)
        self.stage._watches.setdefault(0, BlockWatch(self.module))
        self.module(torch.randn(4, 3))


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("number", [0, 1])
def test_a_step_that_is_given_up_leaves_no_trace(steps_before: int, number: int, module: Counts) -> None:
    runs = Runs(module)
    for at in range(steps_before):
        runs.begin(States(note=number and at + 1))
        runs.states.end()
        runs.states.keep()
    before = state(module)
    for _ in range(2):  # it may be given up twice
        runs.begin(States(note=number and steps_before + 1))
        assert state(module) != before
        runs.states.settle(counts=False)
        assert state(module) == before
    assert float(module.total) == 4 * steps_before


def test_a_step_that_counts_is_kept(module: Counts) -> None:
    runs = Runs(module)
    for settle in (runs.states.keep, lambda: runs.states.settle(counts=True)):
        runs.begin(States(note=1 + module.num))
        settle()
        after = state(module)
        runs.states.settle(counts=False)
        assert state(module) == after


def test_a_call_that_runs_once_more_finds_what_it_found_and_leaves_no_trace(module: Counts) -> None:
    runs, found = Runs(module), []
    module.norm.momentum = 0.5
    for number in (1, 2, 3):
        found.append(state(module))
        runs.begin(States(note=number))
        runs.states.end()
    after = state(module)
    seen = []
    module.register_forward_pre_hook(lambda each, _: seen.append(state(each)))
    for number in (2, 3, 1):
        runs.begin(States(start=number))
        runs.states.end()
        assert state(module) == after
    assert seen == [found[1], found[2], found[0]]


def test_one_that_is_given_up_on_the_way_leaves_none_either(module: Counts) -> None:
    runs = Runs(module)
    for number in (1, 2):
        runs.begin(States(note=number))
        runs.states.end()
    after = state(module)
    runs.begin(States(start=1))
    runs.states.settle(counts=False)
    assert state(module) == after
    runs.begin(None, repeats=True)
    runs.states.end()
    assert state(module) == after


def test_calls_that_begin_again_take_all_of_it_back(module: Counts) -> None:
    """What the second one had noted the first time is not what it finds now."""
    runs, before = Runs(module), state(module)
    for number in (1, 2):
        runs.begin(States(note=number))
        runs.states.end()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counts, "forward", lambda self, x: seen.append(state(self)))
        seen: list[object] = []
        runs.begin(States(note=1))
        runs.begin(States(note=2))
    assert seen == [before, before]


def test_copies_are_freed_when_steps_note_nothing_any_more(module: Counts) -> None:
    runs = Runs(module)
    runs.begin(States(note=1))
    runs.states.end()
    runs.states.forget()
    copies = [weakref.ref(cell._last[1]) for cell in runs.states._cells.values() if cell._last[1] is not None]
    assert copies
    runs.states.begin(None, repeats=False, may_repeat=False)
    assert all(copy() is None for copy in copies)


def test_what_is_not_needed_is_forgotten(module: Counts) -> None:
    runs = Runs(module)
    for number in (1, 2, 3):
        runs.begin(States(note=number, oldest=2))
        runs.states.end()
    with pytest.raises(SkipPipeError, match="was lost in between"):
        runs.begin(States(start=1))
    runs.begin(States(start=2))
    runs.states.end()
    runs.states.forget()
    with pytest.raises(SkipPipeError, match="was lost in between"):
        runs.begin(States(start=3))


def test_an_evaluation_that_begins_again_leaves_what_one_leaves(module: Counts) -> None:
    """It is several steps, of which any may be given up; the next evaluation goes on from what it has left."""
    module.eval()
    runs, twin = Runs(module), copy.deepcopy(module)

    def evaluate(number: int, *samples: int) -> None:
        for step, each in enumerate(samples):
            order = States(evaluation=number, weights=[(0, "book")]) if step == 0 else None
            runs.states.begin(order, repeats=False, may_repeat=False)
            runs.stage._watches.setdefault(0, BlockWatch(module))
            module(torch.randn(each, 3))
            runs.states.end()

    evaluate(1, 4, 5)
    evaluate(1, 4)
    evaluate(1, 4, 5, 6)
    evaluate(2, 7)
    evaluate(2, 8, 9)
    for each in (4, 5, 6, 8, 9):
        twin(torch.randn(each, 3))
    assert (module.seen, module.num, float(module.total)) == (twin.seen, twin.num, float(twin.total))
    assert torch.equal(module.book, twin.book)
