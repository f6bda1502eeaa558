"""The driver of an elastic run is killed, also while blocks move: the next one finds them wherever they are."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import mortal
from tests.processes.support import start
from tests.processes.test_driver_recovery import SCRIPT, assert_like


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    mortal.fit(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a run leaves its traces; workers that joined it must end with it."""
    yield tmp_path
    deadline = time.monotonic() + 30
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, (tmp_path / "joined").read_text()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def run(folder: Path, moves: str, *moments: str, timeout_s: float = 170) -> str:
    """Run the script under a supervisor; return what it said on standard error."""
    command = [sys.executable, "-m", "skippipe_plugin.cli", "run", "--", sys.executable, str(SCRIPT)]
    process = start([*command, str(folder), ",".join(moments), json.dumps({"devices": 3, "moves": moves})])
    try:
        _, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    return errors


def stages(folder: Path) -> list[int]:
    """The numbers of stages that followed each other."""
    counts = list(map(int, (folder / "stages").read_text().split()))
    return [count for count, before in zip(counts, [0, *counts[:-1]], strict=True) if count != before]


@pytest.mark.slow
def test_a_driver_that_is_killed_in_the_middle_of_a_move_goes_on(undisturbed: Path, folder: Path) -> None:
    errors = run(folder, "+@2", "Arrange:2")
    assert "the driver was lost in fit 1, which goes on from memory at epoch 0, batch 2" in errors
    assert stages(folder)[-1] == 3
    assert_like(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whatever_of_a_move_was_done(undisturbed: Path, folder: Path) -> None:
    """Whoever had joined comes back, and the move is made anew until a driver lives through it."""
    moments = ["Get:2", "AskRecords:1", "Arrange:1", "Arrange:2", "Arrange:3", "LetGo:1", "LetGo:3"]
    run(folder, "+@2", *moments, timeout_s=1100)
    assert stages(folder)[-1] == 3
    assert_like(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("moment", ["Arrange:4", "Arrange:5", "LetGo:4", "LetGo:5", "on_before_optimizer_step:6"])
def test_a_worker_that_leaves_takes_nothing_with_it(undisturbed: Path, folder: Path, moment: str) -> None:
    """It kept a copy of the driver's state; the wish to leave survives the driver. Three orders were for who came."""
    errors = run(folder, "+@2,-1@5", moment)
    assert "the driver was lost in fit 1, which goes on from memory" in errors
    assert stages(folder)[:2] == [2, 3]
    assert stages(folder)[-1] == 2
    assert_like(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_both_keepers_of_the_drivers_state_leave_at_once(undisturbed: Path, folder: Path) -> None:
    """All that is left has joined by hand.

    Who leaves in the step in which the driver dies may not have been sent home: the next one takes it, and relieves it.
    """
    errors = run(folder, "+@1,+@1,-@4", "on_after_backward:5", "on_train_batch_start:3", timeout_s=500)
    assert "workers left: 2 stages instead of 4" in errors
    assert stages(folder)[:2] == [2, 4]
    assert_like(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_is_relieved_while_the_driver_dies(undisturbed: Path, folder: Path) -> None:
    """One joins as another leaves: it takes its place, and the driver dies before it has; then after."""
    run(folder, "+@3,-2@3", "Arrange:1", "Arrange:1", timeout_s=500)
    assert_like(folder, undisturbed)
