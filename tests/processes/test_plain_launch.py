"""A plain torch loop under torchrun: rank 0 runs it, the others are its workers, and the result is one process's."""

import sys
from pathlib import Path

import pytest

from tests.processes.support import end_well, results_in, start

SCRIPT = Path(__file__).with_name("plain_script.py")


def result(command: list[str]) -> dict:
    ((output, _),) = end_well([start(command)])
    (only,) = results_in(output)
    return only


def test_ranks_of_torchrun_become_workers() -> None:
    alone = result([sys.executable, str(SCRIPT), "plain"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    found = result([*launcher, str(SCRIPT), "pipeline"])
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert found["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    assert (found["workers"], found["imported"]) == (2, [])
