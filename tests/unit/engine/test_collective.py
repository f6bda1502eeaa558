"""Waiting for an operation of several ranks: as long as it takes, but not for longer than the generation lives."""

import sys
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from skippipe_plugin.engine import transport
from skippipe_plugin.engine.transport import FOREVER, Collective


class Operation:
    """Stands for gloo's: is over after so many seconds, with an error or without."""

    def __init__(self, takes_s: float, error: str = "") -> None:
        self._ends_s, self._error = time.monotonic() + takes_s, error

    def is_completed(self) -> bool:
        return time.monotonic() >= self._ends_s

    def wait(self, timeout: timedelta) -> None:
        time.sleep(min(timeout.total_seconds(), max(0.0, self._ends_s - time.monotonic())))
        if not self.is_completed():
            raise RuntimeError("Operation timed out!")
        if self._error:
            raise RuntimeError(self._error)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_SLICE", timedelta(seconds=0.05))


def collective(operation: Any, group: Any = None, aborted: threading.Event | None = None) -> Collective:
    return Collective(operation, group, aborted or threading.Event())


def test_it_takes_as_long_as_it_takes() -> None:
    started_s = time.monotonic()
    collective(Operation(0.3)).wait(FOREVER)
    assert time.monotonic() - started_s >= 0.3


def test_a_failure_is_told() -> None:
    with pytest.raises(RuntimeError, match="Connection reset by peer"):
        collective(Operation(0.1, "Connection reset by peer")).wait(FOREVER)


def test_one_that_never_ends_is_left_with_its_group_when_the_generation_is_given_up() -> None:
    """A group that goes would wait for its threads, and they for a message that gloo has forgotten."""
    group, aborted = object(), threading.Event()
    references = sys.getrefcount(group)
    threading.Timer(0.1, aborted.set).start()
    with pytest.raises(RuntimeError, match="timed out"):
        collective(Operation(1000.0), group, aborted).wait(FOREVER)
    assert sys.getrefcount(group) == references + 1


def test_one_that_ends_as_the_generation_does_keeps_nothing() -> None:
    group, aborted = object(), threading.Event()
    aborted.set()
    references = sys.getrefcount(group)
    with pytest.raises(RuntimeError, match="reset"):
        collective(Operation(0.01, "reset"), group, aborted).wait(FOREVER)
    assert sys.getrefcount(group) == references
