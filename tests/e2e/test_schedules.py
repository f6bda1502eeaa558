"""Schedules of the user's own: any placement and order that validates trains like one process."""

import pytest

from skippipe_plugin.schedule import Path, Schedule, Visit, full_schedule, list_schedule
from skippipe_plugin.strategies import SkipPipeStrategy
from tests.grids import slow

from .models import Transformer, tokens
from .modules import BATCH, LanguageModel, loader
from .support import assert_same_run, train


def interleaved() -> Schedule:
    """Four stages on two workers, each holding two that are not neighbours."""
    placement = ((0,), (1,), (2,), (1,), (2,))
    paths = tuple(Path(0, tuple(Visit(stage, placement[stage][0]) for stage in (1, 2, 3, 4))) for _ in range(4))
    return list_schedule(placement, paths, driver_in_flight=4, name="interleaved")


def on_the_driver_last() -> Schedule:
    """The driver holds the last stage rather than the first."""
    placement = ((0,), (1,), (0,))
    paths = tuple(Path(0, (Visit(1, 1), Visit(2, 0))) for _ in range(4))
    return list_schedule(placement, paths, driver_in_flight=2)


@pytest.mark.parametrize("schedule", [interleaved(), slow(on_the_driver_last())], ids=["interleaved", "driver last"])
def test_a_schedule_of_ones_own(schedule: Schedule) -> None:
    def run(devices: int, strategy: dict):
        return train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH * 3)), devices, strategy)

    assert_same_run(run(1, {}), run(schedule.num_ranks, {"schedule": Schedule.from_json(schedule.to_json())}))


def test_a_schedule_for_another_number_of_devices() -> None:
    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=4)
    with pytest.raises(ValueError, match=r"for 3 ranks with 1 drivers, not for devices=2.*use devices=3"):
        SkipPipeStrategy(schedule=schedule).settings.shape.num_stages(2)
