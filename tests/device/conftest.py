"""Run the tests of this folder in a process of their own that has the simulated device.

It must be there before the first backward: by then torch starts a thread for each device that it knows. And no other
test should come upon an accelerator. So unless this process has it (``pytest --device sim``), another pytest runs all
tests of the folder that are asked for, and each test here tells what became of it there.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from . import build

HERE = Path(__file__).parent
LIMIT_S = 420
collect_ignore = ["sim_device"]  # to be imported from where it is built
Outcomes = dict[tuple[str, str], ElementTree.Element]
"""By module and name."""
_OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the test that comes first time to build the device and to wait for all tests."""
    if not hasattr(torch, "sim"):
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.timeout(LIMIT_S + 60), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if hasattr(torch, "sim"):
        return None
    if reason := build.missing():
        pytest.skip(reason)
    stash = pyfuncitem.session.stash
    if _OUTCOMES not in stash:
        stash[_OUTCOMES] = {}  # once, whatever comes of it
        stash[_OUTCOMES] = _run_all(pyfuncitem.session)
    outcome = stash[_OUTCOMES].get((pyfuncitem.path.stem, pyfuncitem.name))
    if outcome is None:
        pytest.fail("the process with the simulated device did not come to this test", pytrace=False)
    for failure in (*outcome.iter("failure"), *outcome.iter("error")):
        pytest.fail(failure.text or "failed", pytrace=False)
    for skipped in outcome.iter("skipped"):
        pytest.skip(skipped.get("message") or "skipped")
    return True


def _run_all(session: pytest.Session) -> Outcomes:
    """Run the tests of this folder that are asked for, and return what became of each."""
    asked_for = [item.nodeid for item in session.items if item.path.is_relative_to(HERE)]
    report = session.config.cache.mkdir("sim-device") / f"report-{os.getpid()}.xml"
    options = ["-q", "-n", "0", "-m", "", "--device", "sim", f"--junitxml={report}"]  # what is slow may be asked for
    command = [sys.executable, "-m", "pytest", *options, *asked_for]
    run = subprocess.run(
        command, cwd=session.config.rootpath, capture_output=True, text=True, timeout=LIMIT_S, env=_environment()
    )
    if not report.exists():
        pytest.fail(run.stdout + run.stderr, pytrace=False)
    cases = ElementTree.parse(report).getroot().iter("testcase")
    report.unlink()
    return {(case.get("classname", "").rsplit(".")[-1], case.get("name", "")): case for case in cases}


def _environment() -> dict[str, str]:
    """Leave out what this process is to its own pytest, but for the test that is running: it holds the room."""
    ours = {name for name in os.environ if name.startswith(("PYTEST_", "COV_")) and name != "PYTEST_CURRENT_TEST"}
    return {name: value for name, value in os.environ.items() if name not in ours}
