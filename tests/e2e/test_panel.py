"""What a run says when it starts."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import seed_everything

from skippipe_plugin.schedule import CostModel, full_schedule, simulate
from skippipe_plugin.schedule.timeline import utilisation
from skippipe_plugin.strategies import PathConfig, stop_workers

from .models import tokens
from .modules import Configured, loader
from .support import DEVICE, trainer_for

DATA = loader(tokens(8))


@pytest.fixture
def start(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Fits a model and returns the lines that were logged as information."""
    caplog.set_level(logging.INFO, logger="lightning")

    def run(**strategy: object) -> list[str]:
        caplog.clear()
        seed_everything(0, verbose=False)
        trainer = trainer_for(3, {"num_microbatches": 4, **strategy}, max_steps=1)
        model = Configured()
        trainer.fit(model, DATA)
        trainer.validate(model, DATA, verbose=False)
        texts = [record.getMessage() for record in caplog.records]
        return [line for text in texts if text.startswith("SkipPipe") for line in text.splitlines()]

    return run


def test_the_panel_says_once_who_holds_what(start) -> None:
    stop_workers()  # with idle ones of other tests, validate may get others than fit, and says so
    title, head, driver, first, second, prediction = start()
    model = Configured()
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.model.blocks]
    assert title.startswith("SkipPipe: 2 stages of model.blocks: 6 x Block")
    assert title.endswith(f"({sum(blocks):,} parameters); 1f1b, 4 microbatches")
    assert head.split() == ["rank", "where", "device", "stage", "blocks", "parameters"]
    assert driver.split()[:2] == ["0", "driver"]
    devices = ["cpu", "cpu"] if DEVICE.type == "cpu" else ["sim:1", "sim:2"]
    assert [line.split()[4] for line in (first, second)] == devices
    assert [line.split()[5:8] for line in (first, second)] == [["1", "0", "to"], ["2", "3", "to"]]
    assert all(f"{sum(blocks[:3]) / 1000:.1f} K" in line for line in (first, second))
    assert "not predicted, since no costs are known" in prediction


def test_a_quiet_one_says_nothing(start) -> None:
    assert start(verbose=False) == []


def test_the_prediction_is_that_of_the_simulator(start, tmp_path: Path) -> None:
    cost = CostModel.uniform(2, 3)
    cost.save(tmp_path / "costs.json")
    *_, line = start(paths=PathConfig(costs=str(tmp_path / "costs.json")))
    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=4)
    timeline = simulate(schedule, cost)
    assert f": {timeline.makespan_s:.3g} s and {1 - utilisation(timeline, schedule):.0%} " in line


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ({"skip_ratio": 0.5}, "not predicted yet, since costs are measured in the second training step"),
        ({"skip_ratio": 0.5, "paths": PathConfig(costs="uniform")}, "since uniform costs have no unit"),
    ],
    ids=["measured later", "uniform"],
)
def test_what_is_not_known_is_said(start, strategy: dict[str, object], words: str) -> None:
    lines = start(**strategy)
    assert lines[0].endswith(", 50% of the stages skipped")
    assert words in lines[-1]
