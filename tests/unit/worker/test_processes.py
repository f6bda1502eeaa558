"""Processes that cannot be started, or start in vain, are errors at once that name the way out."""

import functools
import subprocess
import sys
import types
from typing import Any

import pytest

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.worker import processes as processes_module
from skippipe_plugin.worker.processes import DriverProcesses, WorkerProcesses


class _Started:
    """A process that was started; nothing runs."""

    pid, returncode = 7, None
    stdin = None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 0.0) -> int:
        return 0


REFUSALS = [BlockingIOError(11, "Resource temporarily unavailable"), OSError(24, "Too many open files"), MemoryError]


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize("bound", [False, True])
def test_a_start_that_fails_leaves_no_process_that_nobody_knows(
    bound: bool, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [_Started()]

    def popen(*_: Any, **__: Any) -> Any:
        if not left:
            raise error
        return left.pop()

    monkeypatch.setattr(subprocess, "Popen", popen)
    started = WorkerProcesses()
    start = functools.partial(started.start, host="127.0.0.1", port=1, secret="00")
    if bound:
        start = functools.partial(started.start_bound, command=["worker"], environment={}, folder=".")
    with pytest.raises(SkipPipeError, match=r"cannot be started: .* raise them, or start fewer workers"):
        start(2)
    assert started.running() == [7]


@pytest.mark.parametrize("file", [None, "<stdin>", "-c", "/nowhere/train.py"])
def test_further_drivers_need_a_file_to_start(file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    if file is not None:
        main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(SkipPipeError, match="standard input, python -c, an interactive session or a notebook"):
        DriverProcesses().start(range(1, 2), 3, "127.0.0.1", 1, "00")


def test_a_file_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the refusal advises."""
    main = types.ModuleType("__main__")
    main.__file__ = __file__
    monkeypatch.setitem(sys.modules, "__main__", main)
    commands: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command) or _Started())
    drivers = DriverProcesses()
    drivers.start(range(1, 3), 3, "127.0.0.1", 1, "00")
    assert len(commands) == 2
    assert commands[0][0] == sys.executable
    assert drivers.ended() == {}


def test_a_driver_that_ends_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = DriverProcesses()
    monkeypatch.setattr(processes_module, "_script", lambda: [sys.executable, "-c", "raise SystemExit(2)"])
    drivers.start(range(1, 2), 2, "127.0.0.1", 1, "00")
    drivers._processes[0].wait(20)
    assert list(drivers.ended().values()) == [2]
    drivers.wait()
