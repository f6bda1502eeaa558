"""The driver is killed, over and over, and training goes on as if it had not been: compared with the plain Trainer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import mortal
from tests.processes.support import start

SCRIPT = Path(mortal.__file__)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    mortal.fit(folder)
    return folder


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events").read_text().splitlines()]


def run(folder: Path, *moments: str, timeout_s: float = 170, dropout: float = 0.0, num_fits: int = 1) -> str:
    """Run the script under a supervisor; return what it said on standard error."""
    command = [sys.executable, "-m", "skippipe_plugin.cli", "run", "--", sys.executable, str(SCRIPT)]
    process = start([*command, str(folder), "3", ",".join(moments), str(dropout), str(num_fits)])
    try:
        _, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-4000:]
    return errors


def assert_like(folder: Path, undisturbed: Path, repeated: int = 0) -> None:
    """Compare events (the last of those that were repeated) and weights."""
    found, expected = events(folder), events(undisturbed)
    while found[0].get("validated") == 0:  # sanity checks
        found.pop(0)
    expected.pop(0)
    once = [
        event for event, following in zip(found, [*found[1:], {}], strict=True) if not same_moment(event, following)
    ]
    assert len(found) - len(once) == repeated
    assert len(once) == len(expected)
    for event, other in zip(once, expected, strict=True):
        for name, value in other.items():
            assert event[name] == pytest.approx(value, rel=1e-4), (name, event, other)
    weights, others = (torch.load(path / "end.pt")["state_dict"] for path in (folder, undisturbed))
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def same_moment(event: dict[str, Any], following: dict[str, Any]) -> bool:
    moments = [{name: e.get(name) for name in ("epoch", "batch", "validated", "ended")} for e in (event, following)]
    return moments[0] == moments[1]


def test_a_driver_that_is_killed_in_a_batch_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    errors = run(tmp_path, "on_before_optimizer_step:4")
    assert "goes on from memory at epoch 0, batch 3, after 3 optimizer steps" in errors
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whenever_it_is_killed(undisturbed: Path, tmp_path: Path) -> None:
    moments = [
        "on_train_start:1",  # before there is anything to go on from
        "on_train_batch_start:1",
        "on_after_backward:2",
        "on_validation_batch_end:2",
        "on_train_batch_end:1",
        "on_train_epoch_end:1",
        "on_train_batch_start:3",
        "on_save_checkpoint:1",
        "on_validation_end:1",
        "on_train_end:1",
    ]
    run(tmp_path, *moments, timeout_s=1100)
    assert_like(tmp_path, undisturbed, repeated=2)  # a validation, and the end of the last epoch


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_step_that_some_workers_have_taken_is_taken_by_all(undisturbed: Path, tmp_path: Path) -> None:
    """Two workers: an odd count of messages is one that the second has not been sent."""
    moments = ["optimizer_step:1", "optimizer_step:5", "merge:3", "optimizer_step:2", "load:1", "keep:2"]
    errors = run(tmp_path, *moments, timeout_s=1100)
    assert "the last of them is not taken again, but its batch is finished" in errors
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_dropout_goes_on_too(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Compared with a pipeline, since dropout draws from other seeds there."""
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    mortal.fit(undisturbed, devices=3, dropout=0.2)
    run(tmp_path, "on_before_optimizer_step:4", timeout_s=500, dropout=0.2)
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_fit_that_was_over_is_not_run_again(undisturbed: Path, tmp_path: Path) -> None:
    run(tmp_path, "on_train_batch_end:13", timeout_s=500, num_fits=2)
    for folder in (tmp_path / "0", tmp_path / "1"):
        assert_like(folder, undisturbed)
