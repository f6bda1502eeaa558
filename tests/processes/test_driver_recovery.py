"""The driver is killed, over and over, and training goes on as if it had not been: compared with the plain Trainer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

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


def run(folder: Path, *moments: str, timeout_s: float = 170, status: int = 0, **settings: Any) -> str:
    """Run the script under a supervisor; return what it said on standard error."""
    command = [sys.executable, "-m", "skippipe_plugin.cli", "run", "--", sys.executable, str(SCRIPT)]
    process = start([*command, str(folder), ",".join(moments), json.dumps({"devices": 3, **settings})])
    try:
        _, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == status, errors[-4000:]
    return errors


def assert_like(folder: Path, undisturbed: Path, repeated: int = 0) -> None:
    """Compare events (the last of those that were repeated) and weights."""
    found, expected = events(folder), events(undisturbed)
    while found[0].get("validated") == 0:  # sanity checks
        found.pop(0)
    expected.pop(0)
    once: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in found:
        once.pop(moment(event), None)
        once[moment(event)] = event
    assert len(found) - len(once) == repeated
    assert len(once) == len(expected)
    for event, other in zip(once.values(), expected, strict=True):
        for name, value in other.items():
            assert event[name] == pytest.approx(value, rel=1e-4), (name, event, other)
    weights, others = (torch.load(path / "end.pt")["state_dict"] for path in (folder, undisturbed))
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def moment(event: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(event.get(name) for name in ("epoch", "batch", "validated", "ended"))


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
    moments = ["StepOptimizer:1", "StepOptimizer:5", "Merge:3", "StepOptimizer:2", "Load:1", "Store:2"]
    errors = run(tmp_path, *moments, timeout_s=1100)
    assert "the last of them is not taken again, but its batch is finished" in errors
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_loss_scale_goes_on_too(tmp_path: Path) -> None:
    """Steps that are skipped, that all have taken, and that some have taken when the driver is killed."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    mortal.fit(undisturbed, loss_scale=2.0**20)
    scales = [event["scaler"] for event in events(undisturbed) if "scaler" in event]
    assert min(scales) < scales[0], "steps were skipped"
    moments = ["on_before_optimizer_step:1", "StepOptimizer:5", "on_train_batch_end:2", "Unscale:2"]
    errors = run(tmp_path, *moments, timeout_s=1100, loss_scale=2.0**20)
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("settings", "moments", "repeated"),
    [
        ({"accumulate_grad_batches": 2}, ["on_train_batch_start:2", "on_before_optimizer_step:2", "on_train_end:1"], 4),
        ({"data": "iterable"}, ["on_train_batch_start:3", "on_train_epoch_end:1", "on_after_backward:2"], 0),
        ({"data": "workers"}, ["on_train_batch_start:3", "on_train_epoch_end:1", "on_after_backward:2"], 0),
    ],
    ids=["accumulation", "iterable", "workers"],
)
def test_windows_and_other_data(settings: dict[str, Any], moments: list[str], repeated: int, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    mortal.fit(undisturbed, **settings)
    run(tmp_path, *moments, timeout_s=500, **settings)
    assert_like(tmp_path, undisturbed, repeated=repeated)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_are_replaced_before_and_after_the_driver_was(undisturbed: Path, tmp_path: Path) -> None:
    """Replicas, so nothing may change. At last a worker that has taken over dies together with the driver."""
    moments = ["on_train_batch_start:2:2+on_after_backward:4", "on_train_batch_start:2:1+on_after_backward:3:01"]
    errors = run(tmp_path, *moments, timeout_s=500, devices=5, replicas=2, recovery={})
    assert errors.count("its weights: copied from another replica, exact") == 2
    assert_like(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_blocks_share_goes_on_as_it_was(tmp_path: Path) -> None:
    """It is the driver's own, so nothing of it is lost with a worker, and nothing is rebuilt."""
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    mortal.fit(undisturbed, shared=True)
    moments = ["on_before_optimizer_step:4", "StepOptimizer:3", "on_train_batch_start:3:02", "Share:2"]
    run(tmp_path, *moments, timeout_s=500, shared=True, recovery={"lr_factor": 1.0})
    assert_like(tmp_path, undisturbed)


class Lost(Callback):
    """What the loss of a block means in one process: the average of those around it, with a fresh optimizer."""

    def __init__(self, block: int, after_steps: int) -> None:
        self.block, self.after_steps = block, after_steps
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        gradients = [[parameter.grad for parameter in block.parameters()] for block in module.blocks]
        self.norms = [float(torch.cat([gradient.flatten() for gradient in each]).norm()) for each in gradients]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step != self.after_steps:
            return
        before, after = (self.norms[self.block + step] + 1e-4 for step in (-1, 1))
        sides = [module.blocks[self.block + step].parameters() for step in (-1, 1)]
        for lost, *others in zip(module.blocks[self.block].parameters(), *sides, strict=True):
            lost.data = (before * others[0].data + after * others[1].data) / (before + after)
            trainer.optimizers[0].state.pop(lost)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["on_before_optimizer_step:4:02", "on_train_batch_start:4:2+Configure:5"])
def test_a_worker_that_dies_with_the_driver_is_rebuilt(moment: str, tmp_path: Path) -> None:
    """At once, or before its replacement has got its blocks."""
    expected = tmp_path / "expected"
    expected.mkdir()
    mortal.fit(expected, callbacks=[Lost(block=1, after_steps=3)])
    errors = run(tmp_path, moment, timeout_s=500, devices=5, recovery={"lr_factor": 1.0})
    assert "worker rank 2 (stage 2) was lost" in errors
    assert "it died together with the driver. A new worker took over" in errors
    assert "average of the neighbouring stages, with a fresh optimizer" in errors
    assert_like(tmp_path, expected)


@pytest.mark.slow
def test_without_recovery_a_worker_that_dies_with_the_driver_is_an_error(tmp_path: Path) -> None:
    errors = run(tmp_path, "on_before_optimizer_step:4:02", status=1)
    assert "lost together with every worker that held the blocks [2, 3]" in errors
    assert "StageRecovery() rebuilds such blocks from the stages around them" in errors
