"""Experts spread over the replicas of a stage, against the plain Trainer with the same hooks."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from skippipe_plugin.callbacks import ExpertConfig, LoadBalancer, StageRecovery
from skippipe_plugin.driver.experts import ExpertMover
from skippipe_plugin.moe import MoEConfig
from skippipe_plugin.moe.routing import Routing
from skippipe_plugin.schedule import expand, full_schedule
from skippipe_plugin.strategies import PathConfig, SkipPipeStrategy
from tests.grids import slow
from tests.unit.moe.families import FAMILIES

from .models import tokens
from .modules import BATCH, loader
from .support import Run, assert_same_run, train
from .test_moe import LENGTH, STEPS, Watch, check, make, plain, run
from .test_recovery import At, Ready, kill


def spread(size: int = 2, replicas: int | None = None, **options: Any) -> dict[str, Any]:
    return {"replicas": replicas or size, "moe": MoEConfig(expert_parallel=size, **options)}


@pytest.mark.parametrize("case", ["mixtral", slow("own")])
def test_spread_experts_train_and_count_as_one_process(case: str) -> None:
    check(case, 3, **spread())


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FAMILIES if case != "mixtral"])
def test_every_family_trains_as_one_process(case: str) -> None:
    check(case, 5, **spread())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (5, spread(4)),
        (3, spread(2, overlap=2)),
        (3, spread(2, overlap="auto")),
        (5, spread(2, 4)),
        (3, spread(2) | {"driver_stage": True, "schedule": "gpipe"}),
        (9, spread(4, 8)),
    ],
    ids=["4 of 4", "in two chunks", "in chunks on trial", "2 of 4", "a stage on the driver", "4 of 8"],
)
def test_any_shape_trains_as_one_process(devices: int, strategy: dict[str, Any]) -> None:
    check("mixtral", devices, **strategy)


def test_short_batches_clipping_biases_and_validation() -> None:
    """Three samples make three microbatches: one replica takes part in the second meeting without tokens."""
    ids = tokens(3 * STEPS, LENGTH)

    def fit(devices: int) -> tuple[Run, Watch]:
        watch = Watch("sign")
        given = None if devices == 1 else {"num_microbatches": 4, "moe": MoEConfig(expert_parallel=2), "replicas": 2}
        data = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=3)
        options = {"gradient_clip_val": 0.05, "val_check_interval": 2, "max_steps": STEPS}
        return train(lambda: make("mixtral"), data, devices, given, val_data=data, callbacks=[watch], **options), watch

    (expected, counted), (found, watch) = fit(1), fit(3)
    assert_same_run(found, expected)
    assert watch.loads() == counted.loads()
    torch.testing.assert_close(found.trainer.callback_metrics, expected.trainer.callback_metrics, rtol=1e-5, atol=1e-6)


def test_partial_paths_and_spread_experts() -> None:
    """Both replicas of a stage skip and visit alike; the plan is one for pairs of microbatches."""
    watch = Watch(config=MoEConfig(expert_parallel=2))
    strategy = {"replicas": 2, "skip_ratio": 0.5, "paths": PathConfig(costs="uniform"), "num_microbatches": 4}
    found = run("mixtral", 5, watch, strategy)
    schedule = found.trainer.strategy.training_schedule
    assert schedule is None or schedule.coupled
    assert all(loss > 0 for loss in found.losses)
    for step in watch.steps:
        assert {each.num_tokens for each in step.values()} == {BATCH // 2 * LENGTH}


def test_skipped_stages_and_dropped_tokens_cost_nothing() -> None:
    """Half of the stages are visited, by tokens of which capacity drops some: one share for both."""
    balancer = LoadBalancer(stages=False, experts=())
    ids = tokens(BATCH * 2, LENGTH)
    data = loader({"input_ids": ids, "labels": ids})
    moe = MoEConfig(capacity_factor=0.5)
    strategy = {"num_microbatches": 4, "skip_ratio": 0.5, "paths": PathConfig(costs="uniform"), "moe": moe}
    found = train(lambda: make("mixtral"), data, 3, strategy, callbacks=[balancer], max_steps=2)
    share = float(found.trainer.callback_metrics["moe/spent_share"])
    assert 0.25 < share < 0.5


def test_dropped_tokens_go_to_experts_of_their_own_worker() -> None:
    """Two of four experts are on each worker, so there is one for every slot that a full expert gave up."""
    watch = Watch(config=MoEConfig(expert_parallel=2, capacity_factor=0.5, rectify="dropped"))
    run("mixtral", 3, watch, {"replicas": 2})
    unlimited = plain("mixtral")[1].steps[0]
    for name, each in watch.steps[0].items():
        assert (each.num_empty, int(each.loads.sum())) == (0, int(unlimited[name].loads.sum()))
        assert each.loads.tolist() != unlimited[name].loads.tolist()


def test_checkpoints_know_nothing_of_where_experts_were(tmp_path: Path) -> None:
    """Spread over two, then in one process, then over four: as one run in one process."""
    ids = tokens(BATCH * 2, LENGTH)  # an epoch of two steps

    def fit(devices: int, strategy: dict[str, Any] | None, steps: int, ckpt: Path | None) -> Run:
        keep = ModelCheckpoint(tmp_path, f"{steps}-{devices}", every_n_train_steps=steps)
        data = loader({"input_ids": ids, "labels": ids})
        options = {"max_steps": steps, "callbacks": [keep], "enable_checkpointing": True}
        if ckpt is not None:
            options["ckpt_path"] = str(ckpt)
        given = None if strategy is None else {"num_microbatches": 4, **strategy}
        return train(lambda: make("mixtral"), data, devices, given, **options)

    expected = fit(1, None, 6, None)
    fit(3, spread(2), 2, None)
    state = torch.load(tmp_path / "2-3.ckpt", weights_only=False)
    plainly = torch.load(tmp_path / "6-1.ckpt", weights_only=False)
    shapes = [{n: t.shape for n, t in each["state_dict"].items()} for each in (state, plainly)]
    assert shapes[0] == shapes[1]
    moments = [
        {
            n: {k: torch.as_tensor(v).shape for k, v in s.items()}
            for n, s in each["optimizer_states"][0]["state"].items()
        }
        for each in (state, plainly)
    ]
    assert moments[0] == moments[1]
    fit(1, None, 4, tmp_path / "2-3.ckpt")
    found = fit(5, spread(4), 6, tmp_path / "4-1.ckpt")
    assert found.losses == pytest.approx(expected.losses[4:], rel=1e-5)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-4, atol=1e-5)


class Shuffle(Watch):
    """Move experts after every step, without asking whether it pays."""

    def __init__(self) -> None:
        super().__init__()
        self.placements: list[dict[Any, tuple[int, ...]]] = []

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        super().on_train_batch_end(trainer, *rest)
        pipeline = trainer.strategy._running().pipeline
        step, size = trainer.global_step, pipeline.layout.expert_parallel
        before = pipeline.shards.placements
        turned = {
            site: tuple(
                (place + (expert + step) % 2) % size for expert, place in enumerate(placement[step:] + placement[:step])
            )
            for site, placement in before.items()
        }
        even = {site: each for site, each in turned.items() if len({each.count(place) for place in range(size)}) == 1}
        ExpertMover(pipeline).move(even)
        self.placements.append(dict(pipeline.shards.placements))


@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_moved_experts_train_as_if_they_had_stayed(replicas: int) -> None:
    """Their weights, and the optimizer's state of them, are where they belong; the losses do not change."""
    watch = Shuffle()
    expected, _ = plain("mixtral")
    found = run("mixtral", 1 + replicas, watch, {"replicas": replicas, "moe": MoEConfig(expert_parallel=2)})
    assert len({str(each) for each in watch.placements}) > 2
    assert_same_run(found, expected, rtol=1e-6)


def test_the_balancer_moves_experts_when_that_pays(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """All tokens go to two experts of the first replica until one of them is moved to the second."""

    def to_two(logits: torch.Tensor, top_k: int, bias: torch.Tensor | None) -> Routing:
        return Routing(logits.softmax(-1)[:, :2], torch.tensor([[0, 1]] * len(logits), device=logits.device))

    config = ExpertConfig(payback_steps=10**6)
    balancer = LoadBalancer(stages=False, experts="placement", every_n_steps=2, expert_config=config)
    ids = tokens(BATCH * 6, LENGTH)
    data = loader({"input_ids": ids, "labels": ids})
    moe = MoEConfig(expert_parallel=2, router=to_two)
    strategy = {"replicas": 2, "num_microbatches": 4, "moe": moe}
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO", "skippipe_plugin"):
        found = train(lambda: make("mixtral"), data, 3, strategy, callbacks=[balancer], logger=logger, max_steps=6)
    (log,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row["moe/rank_imbalance"]]
    assert [float(row["moe/rank_imbalance"]) for row in rows] == [1.0, 0.0, 0.0]
    assert [float(row["moe/moved_experts"]) for row in rows] == [8.0, 0.0, 0.0]  # a pair in each of four layers
    assert "moves 2 experts of model.model.layers.3.mlp.experts" in caplog.text
    plainly = train(lambda: make("mixtral"), data, 1, callbacks=[Watch(config=moe)], max_steps=6)
    assert_same_run(found, plainly)


def test_placement_needs_experts_that_are_spread() -> None:
    with pytest.raises(ValueError, match="experts='placement' moves experts between replicas, and none are spread"):
        fit_with(LoadBalancer(stages=False, experts="placement", every_n_steps=1), {"replicas": 2, "moe": MoEConfig()})


def test_the_auxiliary_loss_counts_both_replicas() -> None:
    """Two microbatches that meet are the whole batch, so its statistics are those of one process."""
    config = MoEConfig(auxiliary_loss=0.5)
    expected = run("mixtral", 1, Watch(config=config))
    watch = Watch(config=MoEConfig(auxiliary_loss=0.5, expert_parallel=2))
    assert_same_run(run("mixtral", 3, watch, {"replicas": 2, "num_microbatches": 2}), expected)
    assert expected.losses[-1] != plain("mixtral")[0].losses[-1]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no replicas": ({"moe": MoEConfig(expert_parallel=2)}, "expert_parallel=2 does not fit replicas=1: .* replicas=2"),
    "more than replicas": (spread(4, 2), "expert_parallel=4 does not fit replicas=2"),
    "not a part of the replicas": (spread(2, 3), "expert_parallel=2 does not fit replicas=3"),
    "microbatches": (spread() | {"num_microbatches": 5}, "num_microbatches=5 does not divide by expert_parallel=2"),
    "a schedule that is not coupled": (
        {
            "moe": MoEConfig(expert_parallel=2),
            "schedule": full_schedule("gpipe", num_stages=1, num_microbatches=4, replicas=2),
        },
        r"couples the ranks \(\), and expert_parallel=2 needs \(\(1, 2\),\)",
    ),
    "a schedule that is coupled": (
        {"schedule": expand(full_schedule("gpipe", num_stages=1, num_microbatches=2), 2)},
        r"couples the ranks \(\(1, 2\),\), and expert_parallel=1 needs \(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_spread_is_refused_at_once(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        SkipPipeStrategy(**settings)


def test_settings_of_the_experts_are_checked() -> None:
    with pytest.raises(ValueError, match="expert_parallel=0 is out of range"):
        MoEConfig(expert_parallel=0)
    for overlap, problem in ((0, "out of range"), ("often", "unknown")):
        with pytest.raises(ValueError, match=f"overlap={overlap!r} is {problem}; it is a whole number of .* 'auto'"):
            MoEConfig(overlap=overlap)
    with pytest.raises(ValueError, match="experts='model' cannot be spread"):
        MoEConfig(expert_parallel=2, experts="model")


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"4 experts of mlp\.experts in block 0 do not divide by expert_parallel=3"):
        run("mixtral", 4, Watch(), spread(3) | {"num_microbatches": 3})


def test_recovery_needs_a_second_holder_of_every_expert() -> None:
    with pytest.raises(ValueError, match="each expert has one holder, so what a lost worker held exists nowhere else"):
        fit_with(StageRecovery(), spread())


def fit_with(callback: Any, strategy: dict[str, Any]) -> None:
    ids = tokens(BATCH, LENGTH)
    data = loader({"input_ids": ids, "labels": ids})
    train(lambda: make("mixtral"), data, 3, {"num_microbatches": 4, **strategy}, callbacks=[callback], max_steps=1)


def test_code_of_the_module_sees_the_whole_model() -> None:
    """Parameters keep their shapes on the driver, and the weights come back whole."""
    shapes: dict[str, torch.Size] = {}

    class Look(Watch):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            shapes.update({name: parameter.shape for name, parameter in pl_module.named_parameters()})

    found = run("mixtral", 3, Look(), spread())
    assert shapes == {name: parameter.shape for name, parameter in found.module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_before_zero_grad"])
def test_a_lost_worker_gets_its_experts_from_their_other_holder(hook: str) -> None:
    """Exactly, with the optimizer's state: losses and weights do not change."""
    ids = tokens(BATCH * STEPS, LENGTH)
    data = loader({"input_ids": ids, "labels": ids})
    given = {"num_microbatches": 4, **spread(2, 4)}
    recovery = StageRecovery()
    callbacks = [Ready(), recovery, At(hook, 2, kill(4))]
    found = train(lambda: make("mixtral"), data, 5, given, callbacks=callbacks, max_steps=STEPS)
    assert_same_run(found, plain("mixtral")[0])
    assert [(event.rank, event.source) for event in recovery.events] == [(4, "replica")]
