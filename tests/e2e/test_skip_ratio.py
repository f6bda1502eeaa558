"""`skip_ratio` on an unchanged module: planned paths, over time, with measured costs, and in evaluation."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import pytest
from lightning.pytorch import seed_everything

from skippipe_plugin.model.skipping import PathPlanner
from skippipe_plugin.schedule import CostModel, Path, Schedule, full_schedule, list_schedule
from skippipe_plugin.strategies import NetworkConfig, PathConfig, SkipPipeStrategy
from tests.grids import slow

from .emulation import Watch
from .models import Transformer, tokens
from .modules import BATCH, LanguageModel, loader
from .support import Run, train, trainer_for

UNIFORM = PathConfig(costs="uniform")


def run(
    skip_ratio: Any,
    *,
    steps: int = 6,
    paths: PathConfig = UNIFORM,
    network: NetworkConfig | None = None,
    devices: int = 5,
    **options: Any,
) -> tuple[Run, Watch]:
    watch = Watch()
    strategy = {"skip_ratio": skip_ratio, "num_microbatches": 8, "paths": paths, "network": network}
    data = loader(tokens(BATCH * steps))
    result = train(
        lambda: LanguageModel(Transformer()), data, devices, strategy, max_steps=steps, callbacks=[watch], **options
    )
    return result, watch


def lengths(schedule: Schedule) -> set[int]:
    return {len(path.visits) for path in schedule.paths}


def test_every_path_leaves_out_its_share_and_stages_are_visited_alike() -> None:
    result, watch = run(0.25)
    for schedule, visits in zip(watch.schedules, watch.visits, strict=True):
        assert lengths(schedule) == {3}
        counted = Counter(stage for path in schedule.paths for stage in path.stages)
        assert visits == counted
        assert max(visits.values()) - min(visits.values()) <= 1
    assert result.losses[-1] < result.losses[0]


def test_the_same_costs_and_seed_give_the_same_run() -> None:
    (first, _), (second, _) = run(0.5), run(0.5)
    assert first.losses == second.losses


@pytest.mark.parametrize(
    "skip_ratio",
    [{2: 0.25, 4: 0.5, 5: 0}, slow(lambda step: [0, 0, 0.25, 0.25, 0.5, 0][step])],
    ids=["mapping", "function"],
)
def test_a_ratio_that_changes_with_the_step(skip_ratio: Any) -> None:
    _, watch = run(skip_ratio)
    assert [lengths(schedule) for schedule in watch.schedules] == [{4}, {4}, {3}, {3}, {2}, {4}]


def test_costs_are_measured_while_nothing_is_skipped() -> None:
    _, watch = run(0.25, paths=PathConfig())
    assert [lengths(schedule) for schedule in watch.schedules] == [{4}, {4}, {3}, {3}, {3}, {3}]


@pytest.mark.slow
def test_links_in_pairs_follow_new_paths() -> None:
    """A group for each link, formed when paths first use it: the same losses as with one group."""
    ratios = {0: 0.0, 1: 0.25, 2: 0.5}
    (in_pairs, _), (one_group, _) = (
        run(ratios, steps=4, network=NetworkConfig(backend="gloo-pairs")),
        run(ratios, steps=4),
    )
    assert in_pairs.losses == one_group.losses


def test_costs_from_a_file(tmp_path: FilePath) -> None:
    file = tmp_path / "costs.json"
    file.write_text(CostModel.uniform(4, 5, latency_s=0.1).to_json())
    _, watch = run(0.25, steps=2, paths=PathConfig(costs=str(file)))
    assert lengths(watch.schedules[0]) == {3}


def validation_loss(devices: int, **strategy: Any) -> float:
    seed_everything(0, verbose=False)
    module, data = LanguageModel(Transformer()), loader(tokens(BATCH))
    (metrics,) = trainer_for(devices, strategy or None).validate(module, data, verbose=False)
    return metrics["val_loss"]


def test_validation_visits_every_stage_unless_asked() -> None:
    alone = validation_loss(1)
    assert validation_loss(5, skip_ratio=0.5, paths=UNIFORM) == pytest.approx(alone, rel=1e-5)
    skipping = validation_loss(5, skip_ratio=0.5, paths=PathConfig(costs="uniform", eval_skip_ratio=0.5))
    assert skipping != pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    ("skip_ratio", "message"),
    [
        (1.0, r"skip_ratio=1.0 is out of range"),
        (-0.1, r"skip_ratio=-0.1 is out of range"),
        (math.nan, "skip_ratio=nan is not a finite number"),
        ("0.25", "skip_ratio='0.25' is of the wrong type"),
        (True, "skip_ratio=True is of the wrong type"),
        ({-1: 0.25}, "begins before step 0"),
        ({3: 2.0}, r"skip_ratio\[3\]=2.0 is out of range"),
        ({0.5: 0.25}, r"is not all whole numbers"),
    ],
)
def test_ratios_that_cannot_be(skip_ratio: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipPipeStrategy(skip_ratio=skip_ratio)


@pytest.mark.parametrize(("result", "message"), [slow(1.5, "=1.5 is out of range"), (None, "=None is not a number")])
def test_a_function_that_returns_no_ratio(result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"skip_ratio\(2\)" + message):
        run(lambda step: 0.0 if step < 2 else result)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_jump": 0}, "max_jump=0 is out of range"),
        ({"max_swaps": 2, "max_back": 0}, "max_swaps=2 contradicts max_back=0"),
        ({"max_swaps": -1}, "max_swaps=-1 is out of range"),
        ({"eval_skip_ratio": 1.0}, "eval_skip_ratio=1.0 is out of range"),
    ],
)
def test_limits_that_cannot_be(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathConfig(**limits)


def exact(**changes: Any) -> Schedule:
    return full_schedule("1f1b", **{"num_stages": 4, "num_microbatches": 8, **changes})


@pytest.mark.parametrize(
    ("skip_ratio", "paths", "message"),
    [
        (0.9, PathConfig(), "skip_ratio=0.9 leaves no stage of 4"),
        ({0: 0.25, 500: 0.9}, PathConfig(), "skip_ratio=0.9 leaves no stage of 4"),
        (0.5, PathConfig(max_jump=1, max_swaps=0), "max_jump=1 is too short"),
    ],
)
def test_what_cannot_be_planned_fails_before_costs_are_measured(skip_ratio: Any, paths: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathPlanner(skip_ratio, paths, exact())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward_s": [1.0, math.nan, 1.0, 1.0, 1.0]}, r"forward_s\[1\] is nan"),
        ({"forward_s": [1.0, -1.0, 1.0, 1.0, 1.0]}, r"forward_s\[1\] is -1.0"),
        ({"backward_s": None}, "lacks 'backward_s'"),
        ({"latency_s": [[0.0, math.inf, 0.0, 0.0, 0.0]] + [[0.0] * 5] * 4}, r"rank 0 to rank 1.*cannot be reached"),
        ({"bandwidth_Bps": [[1.0] * 5] * 4 + [[1.0, 0.0, 1.0, 1.0, 1.0]]}, r"rank 4 to rank 1.*cannot be reached"),
        ({"rank_factor": [1.0, 1.0]}, "rank_factor has 2 entries for 5 ranks"),
    ],
)
def test_cost_files_that_cannot_be_used(tmp_path: FilePath, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(json.loads(CostModel.uniform(4, 5).to_json()) | change))
    with pytest.raises(ValueError, match=rf"costs='.*costs.json': .*{message}"):
        PathPlanner(0.25, PathConfig(costs=str(file)), exact())


def test_cost_files_of_something_else(tmp_path: FilePath) -> None:
    file = tmp_path / "costs.json"
    with pytest.raises(ValueError, match="no such file; give a cost model"):
        PathPlanner(0.25, PathConfig(costs=str(file)), exact())
    CostModel.uniform(6, 7).save(file)
    with pytest.raises(ValueError, match="is for 6 block stages and 7 ranks, and this run has 4 and 5"):
        PathPlanner(0.25, PathConfig(costs=str(file)), exact())


def test_advice_where_the_driver_is_the_limit(tmp_path: FilePath) -> None:
    file = tmp_path / "costs.json"
    for loss_s, helps in ((0.1, True), (100.0, False)):
        CostModel.uniform(4, 5, loss_s=loss_s).save(file)
        planner = PathPlanner(0.25, PathConfig(costs=str(file)), exact())
        planner.required = ()
        planned = planner.next(0)
        assert planned is not None
        assert (planner.advice(planned) is None) == helps


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (exact(), {"num_microbatches": 4}, "the schedule has 8 microbatches, num_microbatches=4"),
        (exact(backward=False), {}, "no backward actions"),
        (list_schedule([[0], [1], []], [Path.parse("0: 1@1")]), {}, "no rank of the schedule holds stage 2"),
        (replace(exact(), orders=((),) * 5), {}, "rank 0 never runs 0F0"),
    ],
)
def test_schedules_of_ones_own_that_do_not_fit(schedule: Schedule, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipPipeStrategy(schedule=schedule, **options)


def test_a_schedule_for_another_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"for 5 ranks with 1 drivers, not for devices=4.*use devices=5"):
        train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH)), 4, {"schedule": exact()}, max_steps=1)
