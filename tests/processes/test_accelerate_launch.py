"""``accelerate launch`` with one process and with several gives what ``Accelerator()`` gives in one."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes.support import run, start, wait_until, workers_of

SCRIPT = Path(__file__).with_name("accelerate_script.py")


def launched(*options: str, kind: str = "pipeline") -> list[str]:
    """The command line of the loop under ``accelerate launch``."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--dynamo_backend=no"]
    return [*launcher, "--mixed_precision=no", *options, str(SCRIPT), kind]


@pytest.fixture(scope="module")
def alone() -> dict:
    return run([sys.executable, str(SCRIPT), "plain"])[0]


def test_several_processes_are_the_driver_and_its_workers(alone: dict) -> None:
    (result,) = run(launched("--multi_gpu", "--num_processes=4"))  # its way of starting several, GPUs or not
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert (result["workers"], result["processes"]) == (3, 1)


@pytest.mark.slow
def test_one_process_starts_its_workers(alone: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPPIPE_NUM_STAGES", "2")
    (result,) = run(launched("--cpu", "--num_processes=1"))
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert result["workers"] == 2


@pytest.mark.slow
def test_settings_that_do_not_fit_the_processes_end_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPPIPE_NUM_STAGES", "2")
    process = start(launched("--multi_gpu", "--num_processes=4"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "num_stages=2, but 4 processes make 3" in errors


@pytest.mark.slow
def test_workers_end_with_a_loop_that_is_killed() -> None:
    process = start([sys.executable, str(SCRIPT), "pipeline", "slow"])
    workers: list[psutil.Process] = []
    try:
        assert wait_until(lambda: len(workers_of(process.pid)) == 4)
        workers = workers_of(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if not workers else process.kill()
        process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


@pytest.mark.slow
def test_importing_starts_nothing() -> None:
    code = (
        "import threading, psutil, torch, skippipe_plugin.accelerate;"
        "assert threading.active_count() == 1 and not psutil.Process().children();"
        "assert not torch.distributed.is_initialized()"
    )
    process = start([sys.executable, "-c", code])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
