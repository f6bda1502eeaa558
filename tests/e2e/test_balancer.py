"""The balancer moves work away from a worker that became slow, and results stay those of the paths it chose."""

import csv
import itertools
import logging
import os
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from skippipe_plugin.callbacks import LoadBalancer, PipelineMonitor
from skippipe_plugin.moe import MoEConfig, MoELayer
from skippipe_plugin.schedule import Schedule, full_schedule
from tests.grids import slow

from .emulation import OneBlockPerStage, Watch
from .models import Block, tokens
from .modules import loader
from .support import Run, assert_same_run, train, trainer_for

pytestmark = pytest.mark.alone

STEPS, MICROBATCHES = 14, 8
SLOW_FROM = 12
"""The training forward, counted on each worker, from which one worker is slow."""
QUICK_S, SLOW_S = 0.004, 0.05


class Sleeper(Block):
    """A block whose forward takes a while. The first worker to create the file ``claim`` becomes the slow one."""

    def __init__(self, claim: str = "", seconds: float = QUICK_S) -> None:
        super().__init__(16)
        self.claim, self.seconds, self.calls = claim, seconds, itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        if self.claim and self.training and next(self.calls) == SLOW_FROM:
            with suppress(FileExistsError):
                os.close(os.open(self.claim, os.O_CREAT | os.O_EXCL))
                self.seconds = SLOW_S
        time.sleep(self.seconds)
        return super().forward(x)


class Forwards(Callback):
    """Notes how long the forwards of stage 1 take at most on each rank."""

    def __init__(self) -> None:
        self.longest_s: Counter[int] = Counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        by_rank: dict[int, list[float]] = defaultdict(list)
        timeline = trainer.strategy.timeline  # type: ignore[attr-defined]
        for event in timeline.events if timeline is not None else ():
            if (event.action.stage, event.action.op) == (1, "F"):
                by_rank[event.rank].append(event.duration_s)
        for rank, seconds in by_rank.items():
            self.longest_s[rank] = max(self.longest_s[rank], median(seconds))


def run(tmp_path: Path, skip_ratio: Any, *callbacks: Any) -> tuple[Run, Watch, LoadBalancer]:
    balancer, watch = LoadBalancer(every_n_steps=1, min_steps=2, window=3), Watch()
    result = train(
        lambda: OneBlockPerStage([Sleeper(str(tmp_path / "slow")), Sleeper()], (16, 16)),
        loader(tokens(MICROBATCHES * STEPS), MICROBATCHES),
        5,
        {"skip_ratio": skip_ratio, "num_microbatches": MICROBATCHES, "replicas": 2, "blocks": "blocks"},
        max_steps=STEPS,
        callbacks=[watch, balancer, *callbacks],
        logger=CSVLogger(tmp_path, name="log", version=0),
        log_every_n_steps=STEPS,
    )
    return result, watch, balancer


def visits(schedule: Schedule) -> Counter[int]:
    return Counter(visit.rank for path in schedule.paths for visit in path.visits)


@pytest.mark.parametrize("skip_ratio", [slow(0.0), {0: 0.5, 12: 0.0}], ids=["exact", "skipping"])
def test_work_moves_away_from_a_worker_that_becomes_slow(tmp_path: Path, skip_ratio: Any, caplog: Any) -> None:
    forwards, monitor = Forwards(), PipelineMonitor(every_n_steps=5, picture=False)
    with caplog.at_level(logging.INFO, logger="skippipe_plugin"):
        result, watch, balancer = run(tmp_path, skip_ratio, forwards, monitor)
    data = loader(tokens(MICROBATCHES * STEPS), MICROBATCHES)
    alone = train(
        lambda: OneBlockPerStage([Sleeper(seconds=0), Sleeper(seconds=0)], (16, 16), watch.schedules),
        data,
        1,
        max_steps=STEPS,
    )
    assert_same_run(result, alone)

    slow, quick = sorted(forwards.longest_s, key=forwards.longest_s.get, reverse=True)
    before, after = visits(watch.schedules[0]), visits(watch.schedules[11])
    assert before[slow] == before[quick]
    assert after[slow] < after[quick]
    lines = [record.getMessage() for record in caplog.records if "changes the paths" in record.getMessage()]
    assert len(lines) == balancer.changes
    assert "simulated; visits: " in lines[0]
    with (tmp_path / "log/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["balance/present_s"]]
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS))
    assert float(rows[-1]["balance/changes"]) == balancer.changes


class SleepyExperts(Sleeper):
    """A sleeper with a mixture of experts."""

    def __init__(self, claim: str = "", seconds: float = QUICK_S) -> None:
        super().__init__(claim, seconds)
        self.moe = MoELayer(16, 12, 4, router="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.moe(x))


@pytest.mark.slow
def test_replicas_that_share_experts_lose_work_together(tmp_path: Path) -> None:
    """Two pairs of replicas; when one rank is slow its pair gets fewer pairs of microbatches. Results do not change."""
    balancer, watch, forwards = LoadBalancer(every_n_steps=1, min_steps=2, window=3), Watch(), Forwards()
    data = loader(tokens(MICROBATCHES * STEPS), MICROBATCHES)

    def module(claim: str, seconds: float) -> OneBlockPerStage:
        return OneBlockPerStage([SleepyExperts(claim, seconds)], (16, 16))

    moe = MoEConfig(expert_parallel=2)
    strategy = {"num_microbatches": MICROBATCHES, "replicas": 4, "blocks": "blocks", "moe": moe}
    callbacks = [watch, forwards, balancer]
    found = train(
        lambda: module(str(tmp_path / "slow"), QUICK_S), data, 5, strategy, max_steps=STEPS, callbacks=callbacks
    )
    assert_same_run(found, train(lambda: module("", 0.0), data, 1, max_steps=STEPS))
    slow = max(forwards.longest_s, key=forwards.longest_s.__getitem__)
    pair, others = ((1, 2), (3, 4)) if slow in (1, 2) else ((3, 4), (1, 2))
    after = visits(watch.schedules[-1])
    assert balancer.changes
    assert after[pair[0]] == after[pair[1]] < after[others[0]] == after[others[1]]


def test_a_schedule_of_ones_own_has_nothing_to_choose() -> None:
    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=2)
    with pytest.raises(ValueError, match=r"LoadBalancer chooses paths.*schedule of your own"):
        train(
            lambda: OneBlockPerStage([Block(16), Block(16)], (16, 16)),
            loader(tokens(4), 4),
            3,
            {"schedule": schedule},
            callbacks=[LoadBalancer()],
        )


def test_another_strategy_is_an_error_before_work() -> None:
    trainer = trainer_for(1, callbacks=[LoadBalancer()], max_steps=1)
    with pytest.raises(TypeError, match=r"LoadBalancer is for pipelines, .*SingleDeviceStrategy"):
        trainer.fit(OneBlockPerStage([Block(16)], (16, 16)), loader(tokens(4), 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": False}, "nothing to balance"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"min_gain": 0.0}, "min_gain=0.0 is out of range"),
        ({"min_steps": 0}, "min_steps=0"),
        ({"window": 0}, "window=0"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadBalancer(**arguments)
