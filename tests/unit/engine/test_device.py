"""What a process computes on, as far as a host without an accelerator can tell."""

import types
from typing import Any

import pytest
import torch

from skippipe_plugin.engine import device as module
from skippipe_plugin.engine import executor as executor_module
from skippipe_plugin.engine.device import (
    HOST,
    current,
    kept_random_states,
    make_current,
    own_place,
    random_states,
    seed_everything,
    set_random_states,
    synchronize,
)
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.program import Plan, compile_program
from skippipe_plugin.schedule import full_schedule


def test_the_host_needs_nothing() -> None:
    make_current(HOST)
    synchronize(HOST)
    assert current() == HOST


def test_seeds_and_states_of_the_host() -> None:
    seed_everything(3, HOST)
    states = random_states(HOST)
    first = torch.rand(4)
    with kept_random_states(HOST):
        seed_everything(4, HOST)
    set_random_states(HOST, states)
    assert torch.equal(torch.rand(4), first)


def test_a_place_names_the_host_and_what_a_scheduler_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = own_place("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    after = own_place()
    assert before.host == after.host != ""
    assert after.visible != before.visible
    assert (before.device, after.device) == ("cpu", "")


def test_an_accelerator_that_is_not_here_is_an_error() -> None:
    with pytest.raises(SkipPipeError, match=r"is to compute on cuda:1, but .* has no accelerator"):
        make_current(torch.device("cuda:1"))


class Generator:
    def __init__(self) -> None:
        self.seeded: list[int] = []

    def manual_seed(self, seed: int) -> None:
        self.seeded.append(seed)


def test_the_generator_of_the_very_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = (Generator(), Generator())
    fake: Any = types.SimpleNamespace(default_generators=generators)
    monkeypatch.setattr(torch, "get_device_module", lambda _: fake)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    module._seeder.cache_clear()
    seed_everything(7, torch.device("xpu:1"))
    module._seeder.cache_clear()
    assert [each.seeded for each in generators] == [[], [7]]


def test_a_kind_of_device_without_seeds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: types.SimpleNamespace())
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    module._seeder.cache_clear()
    with pytest.raises(SkipPipeError, match="manual_seed"):
        seed_everything(7, torch.device("xpu:1"))


@pytest.mark.parametrize("measured", [False, True])
def test_measured_actions_are_over_on_the_device(monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    """Whatever was started is waited for before an action and before its end is noted; else nothing is waited for."""
    waited: list[torch.device] = []
    monkeypatch.setattr(executor_module, "synchronize", waited.append)
    transport: Any = types.SimpleNamespace(rank=1, posts_ahead=True, end_step=lambda: None)
    feed: Any = None
    executor = executor_module.Executor(transport, {}, torch.device("xpu:0"), timed=True, measured=measured)
    monkeypatch.setattr(executor, "_ready", lambda *_: None)
    monkeypatch.setattr(executor, "_take", lambda *_: None)
    monkeypatch.setattr(executor, "_execute", lambda *_: None)
    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=3)
    events = executor.run(Plan(compile_program(schedule, 1), {0, 1, 2}), feed)
    assert len(waited) == (2 * len(events) if measured else 0)
    assert events
