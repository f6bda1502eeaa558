"""accelerate's own loops give what they give with ``Accelerator()``; only the line of the accelerator differs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process

from tests.e2e import loops
from tests.e2e.loops import assert_same, both


def test_a_loss_of_the_loop() -> None:
    assert_same(*both(loops.quicktour))


def test_sequence_classification() -> None:
    assert_same(*both(loops.classification))


@pytest.mark.slow
def test_sequence_classification_in_bfloat16() -> None:
    found, expected = both(loops.classification, mixed_precision="bf16")
    assert_same(found, expected, rtol=0.03)


def test_gradient_accumulation() -> None:
    assert_same(*both(loops.accumulation, gradient_accumulation_steps=3))


def test_accumulation_by_hand() -> None:
    assert_same(*both(loops.by_hand))


def test_clipping_in_the_middle_of_an_accumulation() -> None:
    assert_same(*both(loops.by_hand, True))


def test_labels_that_the_loss_ignores() -> None:
    assert_same(*both(loops.language))


def test_checkpoints_are_those_of_one_process(tmp_path: Path) -> None:
    found, expected = both(loops.checkpointing, tmp_path / "unused")
    assert_same(found, expected)
    folders = {}
    for kind in ("pipeline", "plain"):
        with loops.accelerator(kind) as current:
            torch.manual_seed(0)
            folders[kind] = tmp_path / kind
            loops.checkpointing(current, folders[kind])
    for saved_by in folders:
        for kind in folders:
            with loops.accelerator(kind, num_stages=1) if kind == "pipeline" else loops.accelerator(kind) as current:
                torch.manual_seed(1)
                resumed = loops.checkpointing(current, tmp_path, resume=folders[saved_by])
            torch.testing.assert_close(torch.tensor(resumed.losses), torch.tensor(expected.losses[3:]))
            for name, weight in resumed.weights.items():
                torch.testing.assert_close(weight, expected.weights[name], rtol=1e-4, atol=1e-5)


def test_early_stopping() -> None:
    found, expected = both(loops.early_stopping)
    assert_same(found, expected)
    assert len(found.losses) < 50


class Notes(GeneralTracker):
    name = "notes"
    requires_logging_directory = False
    written: list[tuple[Any, int | None]] = []  # noqa: RUF012 - one list for all, as a file would be

    @property
    def tracker(self) -> None:
        return None

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        self.written.append((values, None))

    @on_main_process
    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.written.append((values, step))


def test_trackers_write_once() -> None:
    Notes.written.clear()
    with loops.accelerator("pipeline", log_with=[Notes()]) as current:
        current.init_trackers("project", {"lr": 0.1})
        record = loops.quicktour(current)
        for step, loss in enumerate(record.losses):
            current.log({"loss": loss}, step=step)
        current.end_training()
    assert Notes.written == [({"lr": 0.1}, None), *(({"loss": loss}, step) for step, loss in enumerate(record.losses))]
