"""What every test may count on: one thread per process, and nothing left behind by the test before."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

DOOR, ROOM = Path(__file__), Path(__file__).parent
"""Two things to lock, that all processes of a run have."""
GRACE_S = 5.0
LEAK_PREFIXES = ("SKIPPIPE_", "RANK", "WORLD_SIZE", "MASTER_")
INSIDE = "PYTEST_CURRENT_TEST" in os.environ
"""A test of another pytest started this one, and waits for it in the room."""
# Helpers that Python and torch start once and keep until the process ends.
LONG_LIVED = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "torch/_inductor/compile_worker")

# Busy machines are slow at times, and a failure in CI must be repeatable.
settings.register_profile("skippipe", deadline=None, derandomize=True)
settings.load_profile("skippipe")

# Children inherit it. Two threads per process on contended cores cost far more than they bring.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "sim"), default="cpu", help="sim: train on simulated devices (tests/device)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have the simulated device before the first operation, if it is to be there."""
    if config.getoption("--device") == "sim":
        from tests.device import build

        if reason := build.missing():
            raise pytest.UsageError(reason)
        build.load(build.installed(config.cache.mkdir("sim-device")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what the simulated device lacks."""
    if config.getoption("--device") == "sim":
        from tests.device.left_out import LEFT_OUT

        for item in items:
            if reason := LEFT_OUT.get(item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))


class _Scopes(LoadFileScheduling):
    """Gives each test file to one process, and all of the simulated device to the same: it runs them at once."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/device" if nodeid.startswith("tests/device/") else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return _Scopes(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test that is marked ``alone`` run beside no other test of this folder."""
    if INSIDE:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with contextlib.ExitStack() as held:
        with _locked(DOOR, fcntl.LOCK_EX):  # who waits to be alone keeps it, so that nobody slips in
            held.enter_context(_locked(ROOM, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """Hold a lock on what lies at a path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that a test has forked holds it open, too
        os.close(descriptor)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a child process or a variable of a launcher behind, and clean up after it."""
    processes, variables = set(_children()), _variables()
    yield
    left = _end_all_but(processes)
    leaked = {name for name in variables | _variables() if variables.get(name) != os.environ.get(name)}
    _restore(variables, leaked)
    if left:
        pytest.fail(f"The test left processes that were still there after {GRACE_S:g} s: {left}", pytrace=False)
    if leaked:
        pytest.fail(f"The test changed environment variables: {sorted(leaked)}", pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def workers_end_with_the_session() -> Iterator[None]:
    """End the workers that one test after the other took over, and see that this leaves none."""
    yield
    workers = _reusable_workers()
    if job := sys.modules.get("skippipe_plugin.job.job"):
        job.stop_workers()
    _, left = psutil.wait_procs(workers, timeout=0)
    assert not left, f"stop_workers() left {left}"


def _reusable_workers() -> set[psutil.Process]:
    """List the workers that this process keeps for its next pipeline; a test may leave them."""
    job = sys.modules.get("skippipe_plugin.job.job")
    drivers = [entry for entry in job._registry.values() if isinstance(entry, job.DriverJob)] if job else []
    pids = {int(ticket) for driver in drivers for ticket in driver.crew.running() if ticket.isdecimal()}
    return {child for child in _children() if child.pid in pids}


def _children() -> list[psutil.Process]:
    """List the living descendants of this process."""
    return [child for child in psutil.Process().children(recursive=True) if _counts(child)]


def _counts(child: psutil.Process) -> bool:
    try:
        return child.status() != psutil.STATUS_ZOMBIE and not any(name in _command(child) for name in LONG_LIVED)
    except psutil.NoSuchProcess:
        return False


def _end_all_but(known: set[psutil.Process]) -> list[str]:
    """Give new children time to go, kill those that stay, and describe them."""
    deadline = time.monotonic() + GRACE_S
    while (alive := set(_children()) - known - _reusable_workers()) and time.monotonic() < deadline:
        psutil.wait_procs(alive, timeout=0.1)
    left = [f"{child.pid} {_command(child)[:200]}" for child in alive]
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)
    return left


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "(ended just now)"


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(LEAK_PREFIXES)}


def _restore(variables: dict[str, str], leaked: set[str]) -> None:
    for name in leaked:
        if name in variables:
            os.environ[name] = variables[name]
        else:
            del os.environ[name]
