"""Suspended functions keep their own grad mode and autocast, and their exceptions keep their traceback."""

import contextvars
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skippipe_plugin.driver.capture import greenlets
from skippipe_plugin.driver.capture.suspend import (
    Returned,
    StepAbandoned,
    StepThread,
    StepThreads,
    Suspended,
    current_thread,
)
from skippipe_plugin.engine.call import Ambient
from skippipe_plugin.engine.errors import SkipPipeError

PLAIN = Ambient(True, False, ())


@pytest.fixture(params=["greenlets", "threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StepThreads]:
    if request.param == "greenlets":
        pytest.importorskip("greenlet")
    monkeypatch.setattr(greenlets, "AVAILABLE", request.param == "greenlets")
    threads = StepThreads()
    yield threads
    threads.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "skippipe step"]


def ask(request: Any) -> Any:
    thread = current_thread()
    assert isinstance(thread, StepThread)
    return thread.suspend(request)


def test_requests_and_answers_alternate(threads: StepThreads) -> None:
    def function() -> str:
        return f"{ask('first')} {ask('second')}"

    assert threads[0].start(function, PLAIN) == Suspended("first")
    assert threads[0].resume("one") == Suspended("second")
    assert threads[0].resume("two") == Returned("one two")
    assert threads[0].start(lambda: 3, PLAIN) == Returned(3)  # the thread is used again


def test_modes_of_interleaved_functions_stay_apart(threads: StepThreads) -> None:
    def function(grad: bool) -> tuple[bool, bool]:
        with torch.set_grad_enabled(grad):
            ask(None)
            return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    mixed = Ambient(True, False, (("cpu", torch.bfloat16),))
    threads[0].start(lambda: function(False), PLAIN)
    threads[1].start(lambda: function(True), mixed)
    assert threads[0].resume(None) == Returned((False, False))
    assert threads[1].resume(None) == Returned((True, True))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_context_variables_are_inherited(threads: StepThreads) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("outer")
    assert threads[0].start(variable.get, PLAIN) == Returned("outer")
    assert current_thread() is None


def test_what_functions_leave_in_the_context_is_kept_unless_they_are_abandoned(threads: StepThreads) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    def function() -> int:
        found = variable.get()
        variable.set(found + 1)
        ask(None)
        return found

    def run() -> None:
        for expected in (0, 1):
            threads[0].start(function, PLAIN)
            threads[0].abandon()
            threads[0].start(function, PLAIN)
            assert threads[0].resume(None) == Returned(expected)
            assert variable.get() == expected + 1

    contextvars.copy_context().run(run)


def test_exceptions_surface_with_their_traceback(threads: StepThreads) -> None:
    def the_users_function() -> None:
        ask(None)
        raise KeyError("mine")

    threads[0].start(the_users_function, PLAIN)
    with pytest.raises(KeyError, match="mine") as caught:
        threads[0].resume(None)
    assert caught.traceback[-1].name == "the_users_function"


def test_abandoned_functions_are_unwound(threads: StepThreads) -> None:
    log = []

    def function() -> None:
        try:
            ask(None)
        except Exception:
            log.append("swallowed")
        except StepAbandoned:
            log.append("abandoned")
            raise
        finally:
            log.append("closed")

    threads[0].start(function, PLAIN)
    threads.abandon()
    assert log == ["abandoned", "closed"]
    assert threads[0].start(lambda: 1, PLAIN) == Returned(1)


def test_functions_that_are_given_up_leave_nothing_switched_on(threads: StepThreads) -> None:
    """Those that fail by themselves do, as in one process."""

    def function() -> None:
        torch.set_default_dtype(torch.float64)
        answer = ask(None)
        if isinstance(answer, Exception):
            raise answer

    threads[0].start(function, PLAIN)
    threads.abandon()
    assert torch.get_default_dtype() == torch.float32
    threads[0].start(function, PLAIN)
    with pytest.raises(SkipPipeError):
        threads[0].resume(SkipPipeError("no"))
    assert torch.get_default_dtype() == torch.float32
    try:
        threads[0].start(function, PLAIN)
        with pytest.raises(ValueError, match="mine"):
            threads[0].resume(ValueError("mine"))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


class Kept:
    """What a function uses."""


def test_nothing_of_a_function_stays_where_it_ran(threads: StepThreads) -> None:
    kept = [Kept() for _ in range(3)]
    refs = [weakref.ref(each) for each in kept]

    def function(used: Kept, given: Kept) -> Kept:
        assert ask(used) is None
        return given

    threads[0].start(functools.partial(function, kept[0], kept[1]), PLAIN)
    threads[0].resume(None)
    threads[0].start(functools.partial(ask, kept[2]), PLAIN)
    threads[0].abandon()
    kept.clear()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_what_functions_ran_in_ends_with_the_thread(how: str) -> None:
    greenlet = pytest.importorskip("greenlet")
    thread, ran_in = greenlets.GreenletStep(), []
    for _ in range(2):
        thread.start(lambda: ran_in.append(greenlet.getcurrent()), PLAIN)
    first, second = ran_in
    assert first is second
    if how == "closed":
        thread.close()
        assert first.dead
    ends = weakref.ref(first)
    ran_in.clear()
    del thread, first, second
    gc.collect()
    assert ends() is None


def test_numbers_that_are_not_normal_are_what_they_are_outside(threads: StepThreads) -> None:
    def product() -> float:
        return (torch.tensor([1e-310], dtype=torch.float64) * 0.5).item()

    try:
        for flushes in (False, True, False):
            torch.set_flush_denormal(flushes)
            result = threads[0].start(product, PLAIN)
            assert isinstance(result, Returned)
            assert (result.value == 0.0) is flushes
        threads[0].start(lambda: torch.set_flush_denormal(True), PLAIN)
        assert product() == 0.0  # as where it would have run here
    finally:
        torch.set_flush_denormal(False)
