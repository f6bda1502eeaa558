"""Which settings allow the number of stages to change, and what another number makes of them."""

import pytest

from skippipe_plugin.driver.pipeline import EVALUATION, TRAINING
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.model.config import PathConfig
from skippipe_plugin.model.elastic import ElasticShapes, check_elastic
from skippipe_plugin.model.settings import PipelineSettings
from skippipe_plugin.moe import MoEConfig
from skippipe_plugin.schedule import full_schedule

FIXED = {
    "drivers > 1": {"drivers": 2},
    r"moe=\.\.\.": {"moe": MoEConfig()},
    "a schedule of your own": {"schedule": full_schedule("gpipe", num_stages=2, num_microbatches=4)},
    "costs from a file": {"paths": PathConfig(costs="costs.json")},
}


@pytest.mark.parametrize("reason", FIXED)
def test_settings_that_fix_the_number_of_stages_are_refused(reason: str) -> None:
    with pytest.raises(SkipPipeError, match=f"elastic=True does not go with {reason}.*; leave one of them out"):
        check_elastic(PipelineSettings(**FIXED[reason]))


def test_other_settings_are_not() -> None:
    check_elastic(PipelineSettings(replicas=2, skip_ratio=0.25))
    check_elastic(PipelineSettings(driver_stage=True))


def test_the_cut_of_the_batches_stays() -> None:
    shapes = ElasticShapes(PipelineSettings(replicas=2), [1.0] * 6, 0, 8, swap=False)
    for num_stages in range(1, 7):
        shape = shapes(num_stages)
        assert shape.layout.num_blocks == 6
        assert len(shape.layout.workers) == 2 * num_stages
        for name in (TRAINING, EVALUATION):
            assert shape.schedules[name].num_microbatches == 8
            assert shape.schedules[name].placement == shape.layout.placement


def test_numbers_that_the_paths_do_not_allow() -> None:
    assert ElasticShapes(PipelineSettings(), [1.0] * 4, 0, 4, swap=True)(1) is None  # there are no two ends
    assert ElasticShapes(PipelineSettings(), [1.0] * 4, 0, 4, swap=True)(2) is not None
    skipping = ElasticShapes(PipelineSettings(skip_ratio=0.6), [1.0] * 4, 0, 4, swap=False)
    assert skipping(1) is None  # every path would be empty
    assert skipping(4) is not None


def test_the_drivers_own_blocks_stay() -> None:
    shapes = ElasticShapes(PipelineSettings(driver_stage=True), [1.0] * 8, 2, 8, swap=False)
    for num_stages in range(2, 8):
        layout = shapes(num_stages).layout
        assert layout.hosted(0) == [0, 1]
        assert len(layout.stage_blocks) == num_stages
        assert len(layout.workers) == num_stages - 1
        assert [block for blocks in layout.stage_blocks for block in blocks] == list(range(8))
