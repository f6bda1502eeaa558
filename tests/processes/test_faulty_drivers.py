"""Two drivers, and a fault between them and their workers: both end with an error that says whose link it is."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import faulty
from tests.processes.support import start

ENDS = r"worker rank 2 \(stage 1\).*worker rank 3 \(stage 2\)|worker rank 3 \(stage 2\).*worker rank 2 \(stage 1\)"
DRIVER = r"driver.*worker rank 2 \(stage 1\)|worker rank 2 \(stage 1\).*driver"
LOST = r"StageLostError: worker rank {0} \(stage {1}\) is gone: .*, so stage {1} is lost"
NAMED = {
    "cut": ENDS,
    "cut from the driver": DRIVER,
    "commands cut": LOST.format(2, 1),
    "reset": ENDS,
    "stopped": LOST.format(3, 2),
    "killed": LOST.format(3, 2),
    "lost": DRIVER,
}
GIVEN_UP = "driver [01] has given this step up"


def outcomes(name: str, folder: Path, within_s: float) -> list[str]:
    """Run both drivers; return what each ended with."""
    process = start([sys.executable, faulty.__file__, name, str(folder / "said")])
    try:
        _, errors = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"they hang: {[path.read_text() for path in folder.iterdir()]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    said = [folder / f"said-{rank}" for rank in (0, 1)]
    assert all(path.exists() for path in said), errors[-4000:]
    return [path.read_text() for path in said]


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", NAMED)
def test_a_fault_ends_both_drivers_and_is_named(name: str, tmp_path: Path) -> None:
    found = outcomes(name, tmp_path, within_s=120)
    assert any(re.search(NAMED[name], said) for said in found), found
    for said in found:
        assert re.search(f"{NAMED[name]}|{GIVEN_UP}|another driver is gone", said), found


@pytest.mark.slow
def test_without_a_fault_both_are_done(tmp_path: Path) -> None:
    assert outcomes("nothing", tmp_path, within_s=120) == ["done", "done"]
