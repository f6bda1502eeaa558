"""Workers end with their driver, however it ends; a lost worker is a prompt, clear error."""

import os
import signal
import sys
import time

import psutil
import pytest

from tests.grids import slow
from tests.processes.support import half_way, plain, start, wait_until, workers_of

pytestmark = pytest.mark.alone


@pytest.fixture
def training():
    """A driver in the middle of a long fit, with its two workers."""
    driver = start(plain(3, 1, "slow", "pause"))
    try:
        assert half_way(driver)
        workers = workers_of(driver.pid)
        assert len(workers) == 2
        yield driver, workers
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_workers_end_when_the_driver_is_killed(training, stopped: bool) -> None:
    driver, workers = training
    if stopped:  # the kernel ends it, which nobody else could
        workers[0].suspend()
    driver.kill()
    assert wait_until(lambda: gone(workers), timeout_s=5)


def test_a_paused_worker_ends_with_its_driver_too(training) -> None:
    driver, workers = training
    workers[0].suspend()
    driver.kill()
    assert wait_until(lambda: gone(workers), timeout_s=5)


PARENT = """
import os, sys, time
from pathlib import Path
from skippipe_plugin.engine.listener import Listener
from skippipe_plugin.worker import WorkerProcesses
listener = Listener("127.0.0.1", 0, bytes(32))
if sys.argv[1] == "forks":
    if os.fork() == 0:  # as a DataLoader's worker it has all that the driver has open
        os.close(1)
        time.sleep(30)
started = WorkerProcesses()
begin = lambda: started.start(1, host="127.0.0.1", port=listener.port, secret="00" * 32)
if sys.argv[1] == "thread":
    import threading
    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
else:
    begin()
joined = listener.accept(timeout_s=60) if sys.argv[1] != "early" else None
print(started.running()[0], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("way", ["early", "forks", slow("thread")])
def test_workers_end_within_seconds_of_a_parent_that_is_killed(way: str) -> None:
    """While they still import torch; while a fork holds the connection; when another thread has started them."""
    parent = start([sys.executable, "-c", PARENT, way])
    try:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        if way == "thread":
            assert worker.is_running(), "it ended with the thread"
    finally:
        children = psutil.Process(parent.pid).children()
        parent.kill()
    left = time.monotonic()
    assert wait_until(lambda: gone([worker]), timeout_s=5), f"{way}: there after {time.monotonic() - left:.1f} s"
    for child in children:
        child.kill()
    parent.communicate(timeout=10)


def test_a_killed_worker_is_an_error_that_names_its_stage(training) -> None:
    driver, workers = training
    workers[1].kill()
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 1
    assert "StageLostError: worker rank" in errors
    assert "is gone: its process ended" in errors
    assert wait_until(lambda: gone(workers), timeout_s=20)


def test_interrupting_the_driver_ends_everything(training) -> None:
    driver, workers = training
    os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    _, errors = driver.communicate(timeout=40)
    assert driver.returncode == 1
    assert "Detected KeyboardInterrupt" in errors
    assert wait_until(lambda: gone(workers), timeout_s=20)


@pytest.mark.slow
def test_workers_end_without_burning_the_cores(training) -> None:
    """The interpreter's own end takes seconds of each core with torch loaded."""
    driver, workers = training
    used = {worker: sum(worker.cpu_times()[:2]) for worker in workers}
    driver.kill()
    spent = dict.fromkeys(workers, 0.0)

    def look() -> bool:
        for worker in workers:
            try:
                if worker.status() != psutil.STATUS_ZOMBIE:
                    spent[worker] = sum(worker.cpu_times()[:2]) - used[worker]
            except psutil.Error:
                pass
        return gone(workers)

    assert wait_until(look, timeout_s=20)
    assert max(spent.values()) < 0.5
