"""Learning-rate factors of rebuilt stages belong to their blocks: a run may go on with other stages."""

from typing import Any

import pytest

from skippipe_plugin.driver.backward import GradientControl
from skippipe_plugin.driver.copies import GradientCopies
from skippipe_plugin.driver.formation import Formation
from skippipe_plugin.driver.layout import Layout
from skippipe_plugin.driver.links import Links
from skippipe_plugin.driver.shared import SharedTensors


def control(*stages: range) -> GradientControl:
    placement = tuple((rank,) for rank in range(len(stages) + 1))
    formation = Formation(Layout(1, stages, placement), {})
    nobody: Any = None
    return GradientControl(Links(), formation, GradientCopies(nobody), SharedTensors(nobody), leads=True)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([range(2), range(2, 4)], {2: 1.5}),
        ([range(3), range(3, 4)], {1: (1 + 1 + 1.5) / 3, 2: 1.5}),
        ([range(1), range(1, 2), range(2, 3), range(3, 4)], {3: 1.5, 4: 1.5}),
        ([range(4)], {1: 1.25}),
    ],
)
def test_each_stage_has_the_mean_of_its_blocks(stages: list[range], expected: dict[int, float]) -> None:
    before, after = control(range(2), range(2, 4)), control(*stages)
    before.lr_factors[2] = 1.5
    assert before.lr_factors_of_blocks == {2: 1.5, 3: 1.5}
    after.lr_factors_of_blocks = before.lr_factors_of_blocks
    assert after.lr_factors == pytest.approx(expected)
