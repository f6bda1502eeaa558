"""Stages that change the form of the hidden states are visited by every path, in their place; others are skipped."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.schedule import Path, list_schedule
from skippipe_plugin.strategies import PathConfig

from .emulation import OneBlockPerStage, Watch
from .models import Block, Widen, tokens
from .modules import loader
from .support import assert_same_run, train, trainer_for

STEPS = 4
UNIFORM = PathConfig(costs="uniform")


def blocks() -> list[nn.Module]:
    """Five blocks, the third of which changes the width."""
    return [Block(16), Block(16), Widen(16, 24), Block(24), Block(24)]


def follow(paths: PathConfig = UNIFORM, **strategy: Any) -> tuple[Any, Watch, Any]:
    watch, data = Watch(), loader(tokens(8 * STEPS), 8)
    settings = {"skip_ratio": 0.4, "num_microbatches": 4, "paths": paths, "blocks": "blocks", **strategy}
    pipeline = train(
        lambda: OneBlockPerStage(blocks(), (16, 24)), data, 6, settings, max_steps=STEPS, callbacks=[watch]
    )
    alone = train(lambda: OneBlockPerStage(blocks(), (16, 24), watch.schedules), data, 1, max_steps=STEPS)
    return pipeline, watch, alone


@pytest.mark.parametrize("paths", [UNIFORM, PathConfig()], ids=["uniform", "measured"])
def test_a_run_that_skips_around_it_equals_its_emulation(paths: PathConfig) -> None:
    pipeline, watch, alone = follow(paths)
    assert_same_run(pipeline, alone)
    assert {len(path.visits) for path in watch.schedules[-1].paths} == {3}
    assert watch.visits[-1] == {1: 2, 2: 2, 3: 4, 4: 2, 5: 2}
    for path in watch.schedules[-1].paths:
        place = path.stages.index(3)
        assert set(path.stages[:place]) <= {1, 2}
        assert set(path.stages[place + 1 :]) <= {4, 5}


def test_validation_may_skip_around_it_too() -> None:
    paths = PathConfig(costs="uniform", eval_skip_ratio=0.4)
    module = type("Validated", (OneBlockPerStage,), {"validation_step": OneBlockPerStage.training_step})
    trainer = trainer_for(6, {"num_microbatches": 4, "paths": paths, "blocks": "blocks"})
    trainer.validate(module(blocks(), (16, 24)), loader(tokens(8), 8), verbose=False)


def test_a_ratio_that_leaves_the_other_stages_out_for_good() -> None:
    with pytest.raises(ValueError, match=r"stages \(3,\) change the form.*other 4 stages.*lower the ratio to 0.6"):
        follow(skip_ratio=0.8)


class Growing(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("path", ["0: 2@2 3@3", "0: 1@1 2@2", "0: 1@1 3@3 2@2"])
def test_a_schedule_of_ones_own_has_to_visit_it(path: str) -> None:
    schedule = list_schedule([[0], [1], [2], [3]], [Path.parse(path)])
    with pytest.raises(SkipPipeError, match=r"microbatch 0 .*stages \(1, 3\).*stage 1 turns float32\[4, 4\] into"):
        train(Growing, loader(torch.randn(8, 4), 4), 4, {"schedule": schedule})


def test_a_schedule_of_ones_own_may_leave_the_others_out() -> None:
    schedule = list_schedule([[0], [1], [2], [3]], [Path.parse("0: 1@1 3@3")])
    run = train(Growing, loader(torch.randn(8, 4), 4), 4, {"schedule": schedule}, max_steps=2)
    assert run.losses[1] < run.losses[0]
