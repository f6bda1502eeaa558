"""Models as people have them, unmodified: each gives what one process gives, or says why it cannot be cut."""

import pytest

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import PartitionError
from tests.zoo.entries import ZOO
from tests.zoo.running import run, run_skipping

from .support import assert_same_run

EXACT = [name for name, entry in ZOO.items() if not entry.refused]
REFUSED = [name for name, entry in ZOO.items() if entry.refused]
LAYOUTS = [(workers, schedule) for workers in (1, 2, 4) for schedule in ("gpipe", "1f1b")]


@pytest.mark.parametrize("name", EXACT)
def test_each_is_exact(name: str) -> None:
    assert_same_run(run(ZOO[name], 2), run(ZOO[name], 0))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused(name: str) -> None:
    with pytest.raises((SkipPipeError, PartitionError), match=ZOO[name].refused):
        run(ZOO[name], 2)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "schedule"), LAYOUTS)
@pytest.mark.parametrize("name", EXACT)
def test_each_is_exact_in_any_layout(name: str, workers: int, schedule: str) -> None:
    assert_same_run(run(ZOO[name], workers, schedule=schedule), run(ZOO[name], 0))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "schedule"), [layout for layout in LAYOUTS if layout[0] > 1])
@pytest.mark.parametrize("name", EXACT)
def test_paths_are_those_of_one_process_that_follows_them(name: str, workers: int, schedule: str) -> None:
    assert_same_run(*run_skipping(ZOO[name], workers, schedule=schedule))


@pytest.mark.parametrize("costs", ["uniform", "measure"])
@pytest.mark.parametrize("name", ["whisper", "dpo"])
def test_each_step_follows_the_paths_that_it_has_planned(name: str, costs: str) -> None:
    """Also the one between whose calls of the blocks costs become known."""
    assert_same_run(*run_skipping(ZOO[name], 3, costs))
