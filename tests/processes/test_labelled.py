"""Two drivers count the labels of both: what they train is the whole batch of one process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import labelled
from tests.processes.support import start


def train_by_two(folder: Path, **settings: Any) -> str:
    """Return what was said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    process = start([*command, labelled.__file__, str(folder), json.dumps(settings)])
    try:
        output, errors = process.communicate(timeout=170)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    return output + errors


SETTINGS: list[dict[str, Any]] = [
    {"num_microbatches": 2},
    {"num_microbatches": 2, "microbatches": "stack"},
    {"num_microbatches": 1},
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=["cut", "stack", "whole"])
def test_labels_in_unequal_numbers_count_once_with_two_drivers(settings: dict[str, Any], tmp_path: Path) -> None:
    labelled.fit(tmp_path, 1, 0, {})
    train_by_two(tmp_path, **settings)
    expected = torch.load(tmp_path / "1-0")
    for rank in range(2):
        found = torch.load(tmp_path / f"2-{rank}")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [1, 2], ids=["of one", "of both"])
def test_batches_that_cannot_be_cut_weigh_what_the_user_says(packed: int, tmp_path: Path) -> None:
    labelled.fit(tmp_path, 1, 0, {})
    said = train_by_two(tmp_path, packed=packed, num_microbatches=2)
    assert "must share their first dimension" in said
    expected = torch.load(tmp_path / "1-0")
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"2-{rank}"), expected, rtol=1e-5, atol=1e-6)
