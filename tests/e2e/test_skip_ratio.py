"""`skip_ratio` on an unchanged module: planned paths, over time, with measured costs, and in evaluation."""

from collections import Counter
from pathlib import Path as FilePath
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from skippipe_plugin.schedule import CostModel, Schedule
from skippipe_plugin.strategies import PathConfig, SkipPipeStrategy

from .models import Transformer, tokens
from .modules import BATCH, LanguageModel, loader
from .support import Run, train, trainer_for

UNIFORM = PathConfig(costs="uniform")


class Watch(Callback):
    """Notes the schedule and the visits of every step."""

    def __init__(self) -> None:
        self.schedules: list[Schedule] = []
        self.visits: list[dict[int, int]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        assert isinstance(trainer.strategy, SkipPipeStrategy)
        assert trainer.strategy.training_schedule is not None
        self.schedules.append(trainer.strategy.training_schedule)
        self.visits.append(trainer.strategy.visit_counts)


def run(
    skip_ratio: Any, *, steps: int = 6, paths: PathConfig = UNIFORM, devices: int = 5, **options: Any
) -> tuple[Run, Watch]:
    watch = Watch()
    strategy = {"skip_ratio": skip_ratio, "num_microbatches": 8, "paths": paths}
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
    "skip_ratio", [{2: 0.25, 4: 0.5, 5: 0}, lambda step: [0, 0, 0.25, 0.25, 0.5, 0][step]], ids=["mapping", "function"]
)
def test_a_ratio_that_changes_with_the_step(skip_ratio: Any) -> None:
    _, watch = run(skip_ratio)
    assert [lengths(schedule) for schedule in watch.schedules] == [{4}, {4}, {3}, {3}, {2}, {4}]


def test_costs_are_measured_while_nothing_is_skipped() -> None:
    _, watch = run(0.25, paths=PathConfig())
    assert [lengths(schedule) for schedule in watch.schedules] == [{4}, {4}, {3}, {3}, {3}, {3}]


def test_costs_from_a_file(tmp_path: FilePath) -> None:
    file = tmp_path / "costs.json"
    file.write_text(CostModel.uniform(4, 5, latency_s=0.1).to_json())
    _, watch = run(0.25, steps=2, paths=PathConfig(costs=str(file)))
    assert lengths(watch.schedules[0]) == {3}


def test_costs_for_another_number_of_stages(tmp_path: FilePath) -> None:
    file = tmp_path / "costs.json"
    file.write_text(CostModel.uniform(2, 3).to_json())
    with pytest.raises(ValueError, match=r"stage|rank"):
        run(0.25, paths=PathConfig(costs=str(file)))


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
    ("arguments", "message"),
    [
        ({"skip_ratio": 1.0}, r"skip_ratio=1.0 is out of range"),
        ({"skip_ratio": -0.1}, r"skip_ratio=-0.1 is out of range"),
        ({"skip_ratio": {-1: 0.25}}, "begins before step 0"),
        ({"skip_ratio": {3: 2.0}}, r"skip_ratio=2.0 is out of range"),
    ],
)
def test_ratios_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipPipeStrategy(**arguments)


def test_a_ratio_that_leaves_no_stage() -> None:
    with pytest.raises(ValueError, match="leaves no stage"):
        run(0.9, devices=3)
