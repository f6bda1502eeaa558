"""Models as people have them, unmodified: each gives what one process gives."""

import pytest

from tests.grids import slow
from tests.zoo.entries import ZOO
from tests.zoo.running import run, run_skipping

from .support import assert_same_run

EXACT = list(ZOO)
LAYOUTS = [(workers, schedule) for workers in (1, 2, 4) for schedule in ("gpipe", "1f1b")]
SKIPPING = [(name, *layout) for name in EXACT for layout in LAYOUTS if ZOO[name].can_skip(layout[0])]
QUICK = (
    "t5",
    "clip both",
    "llava",
    "dit",
    "u-vit",
    "two streams",
    "detr",
    "dpo",
    "gan",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXACT]
)
def test_each_is_exact(name: str) -> None:
    assert_same_run(run(ZOO[name], 2), run(ZOO[name], 0))


def test_stages_of_one_block_pass_on_what_enters_them() -> None:
    """Their input is that of a block further behind, too."""
    assert_same_run(run(ZOO["u-vit"], 4), run(ZOO["u-vit"], 0))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "schedule"), LAYOUTS)
@pytest.mark.parametrize("name", EXACT)
def test_each_is_exact_in_any_layout(name: str, workers: int, schedule: str) -> None:
    assert_same_run(run(ZOO[name], workers, schedule=schedule), run(ZOO[name], 0))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "workers", "schedule"), SKIPPING)
def test_paths_are_those_of_one_process_that_follows_them(name: str, workers: int, schedule: str) -> None:
    assert_same_run(*run_skipping(ZOO[name], workers, schedule=schedule))


@pytest.mark.parametrize("name", [name for name in EXACT if ZOO[name].visits_all])
def test_what_every_block_makes_is_used_elsewhere_so_that_none_is_skipped(name: str) -> None:
    with pytest.raises(ValueError, match="so every path visits them"):
        run_skipping(ZOO[name], 3)


@pytest.mark.parametrize("costs", [slow("uniform"), "measure"])
@pytest.mark.parametrize("name", [slow("t5"), "dpo"])
def test_each_step_follows_the_paths_that_it_has_planned(name: str, costs: str) -> None:
    """Also the one between whose calls of the blocks costs become known."""
    assert_same_run(*run_skipping(ZOO[name], 4, costs))
