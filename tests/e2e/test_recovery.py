"""Workers are lost at any moment, and training goes on: same batches, same number of steps, and known weights."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torchmetrics import SumMetric

from skippipe_plugin.callbacks import PipelineMonitor, StageRecovery
from skippipe_plugin.driver.pipeline import Pipeline
from skippipe_plugin.driver.recovery import stage_keeper
from skippipe_plugin.recovery import Neighbour, rebuild_stage
from skippipe_plugin.strategies import NetworkConfig, stop_workers
from tests.grids import slow

from .experts import Own
from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import Run, assert_same_losses, assert_same_weights, train

STEPS = 8
BATCH = 4


class Counting(LanguageModel):
    """Counts the samples it was trained and validated on, as users count: with metrics."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], Optimizer]) -> None:
        super().__init__(net)
        self.make_optimizer = optimizer
        self.trained = SumMetric()
        self.validated = SumMetric()
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        self.trained.update(len(batch))
        return super().training_step(batch)

    def validation_step(self, batch: Tensor, batch_idx: int = 0) -> None:
        self.validated.update(len(batch))
        super().validation_step(batch)

    def on_train_epoch_end(self) -> None:
        self.seen.append(float(self.trained.compute()))

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


class At(Callback):
    """Does something to the workers when a hook is reached for the ``step``-th time (or batch), after a delay."""

    def __init__(self, hook: str, step: int, act: Callable[[Trainer], None], delay_s: float = 0.0) -> None:
        self.step, self.act, self.delay_s, self.calls = step, act, delay_s, 0
        setattr(self, hook, self._reached)

    def _reached(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls == self.step:
            timer = threading.Timer(self.delay_s, self.act, [trainer])
            timer.start()
            if not self.delay_s:
                timer.join()


def kill(*ranks: int, how: signal.Signals = signal.SIGKILL) -> Callable[[Trainer], None]:
    def act(trainer: Trainer) -> None:
        pids = trainer.strategy.worker_pids
        for rank in ranks:
            os.kill(pids[rank], how)

    return act


def await_spare(trainer: Trainer, count: int = 1) -> None:
    """Wait until the spares are there, so that a test does not depend on how fast they start."""
    deadline = time.monotonic() + 120
    while len(trainer.strategy.spare_pids) < count:
        assert time.monotonic() < deadline, "no spare came"
        time.sleep(0.05)


class Ready(Callback):
    """Lets training begin when the spares are there."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        await_spare(trainer, self.count)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


def run(
    *happenings: Callback,
    recovery: StageRecovery | None = None,
    replicas: int = 1,
    optimizer: Callable[[Any], Optimizer] = sgd,
    net: Callable[[], nn.Module] = lambda: Transformer(depth=6),
    stages: int = 3,
    strategy: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Run, StageRecovery | None]:
    spares = recovery.policy.spares if recovery is not None else 0
    callbacks = [*([recovery] if recovery is not None else []), *happenings, *([Ready(spares)] if spares else [])]
    settings = {"num_microbatches": 4, "replicas": replicas, **(strategy or {})}
    result = train(
        lambda: Counting(net(), optimizer),
        loader(tokens(STEPS * BATCH), BATCH),
        1 + stages * replicas,
        settings,
        callbacks=callbacks,
        **{"max_steps": STEPS, **options},
    )
    return result, recovery


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    return run()[0]


@pytest.fixture(scope="module")
def undisturbed_replicas() -> Run:
    return run(replicas=2)[0]


def assert_counted(result: Run) -> None:
    assert result.trainer.global_step == STEPS
    assert float(result.module.trained.compute()) == STEPS * BATCH or result.module.seen == [STEPS * BATCH]
    assert len(result.losses) == STEPS


@pytest.mark.parametrize("hook", [slow("on_train_batch_start"), "on_after_backward", slow("on_before_optimizer_step")])
def test_with_a_replica_nothing_changes(hook: str, undisturbed_replicas: Run) -> None:
    result, recovery = run(At(hook, 4, kill(3)), recovery=StageRecovery(), replicas=2)
    assert [event.source for event in recovery.events] == ["replica"]
    assert recovery.events[0].stages == (2,)
    assert_counted(result)
    assert_same_losses(result.losses, undisturbed_replicas.losses)
    assert_same_weights(result.weights, undisturbed_replicas.weights)


@pytest.mark.slow
def test_links_in_pairs_are_given_up_too(undisturbed_replicas: Run) -> None:
    kill_midway = At("on_after_backward", 4, kill(3))
    network = NetworkConfig(backend="gloo-pairs")
    result, _ = run(kill_midway, recovery=StageRecovery(), replicas=2, strategy={"network": network})
    assert_counted(result)
    assert_same_weights(result.weights, undisturbed_replicas.weights)


def test_a_worker_that_leaves_hands_its_stage_over(undisturbed: Run) -> None:
    leave = At("on_train_batch_start", 3, kill(2, how=signal.SIGTERM))
    result, recovery = run(leave, recovery=StageRecovery())
    assert [event.source for event in recovery.events] == ["relieved"]
    assert_counted(result)
    assert_same_losses(result.losses, undisturbed.losses)
    assert_same_weights(result.weights, undisturbed.weights)


@pytest.mark.slow
def test_a_stage_is_handed_over_though_its_replica_dies_meanwhile(monkeypatch, undisturbed_replicas: Run) -> None:
    """Nobody else has it by then."""
    original, victims = stage_keeper.carry_out, [4]

    def carry_out(pipeline: Pipeline, orders: Any) -> None:
        if victims:
            victim = pipeline.links[victims.pop()]
            os.kill(victim.pid, signal.SIGKILL)
            while not victim.gone:
                time.sleep(0.01)
        original(pipeline, orders)

    monkeypatch.setattr(stage_keeper, "carry_out", carry_out)
    leave = At("on_train_batch_start", 3, kill(3, how=signal.SIGTERM))
    result, recovery = run(leave, recovery=StageRecovery(spares=2), replicas=2)
    assert not victims
    assert [event.source for event in recovery.events] == ["relieved", "replica"]
    assert_counted(result)
    assert_same_losses(result.losses, undisturbed_replicas.losses)
    assert_same_weights(result.weights, undisturbed_replicas.weights)


@pytest.mark.parametrize("rank", [slow(1), 2, slow(3)])
def test_neighbours_rebuild_a_stage_by_the_formula(rank: int) -> None:
    """With a learning rate of 0 the weights are those of the start, but for the lost stage."""
    still = {"optimizer": lambda parameters: SGD(parameters, lr=0.0)}
    result, recovery = run(At("on_train_batch_start", 3, kill(rank)), recovery=StageRecovery(rule="mean"), **still)
    assert [event.source for event in recovery.events] == ["neighbours" if rank == 2 else "copy"]
    start, _ = run(**still)
    blocks = [_block(start, block) for block in range(6)]
    assert all(blocks)
    stages = [Neighbour(blocks[first : first + 2], 0.0) for first in (0, 2, 4)]
    before, after = (stages[k] if 0 <= k < 3 else None for k in (rank - 2, rank))
    expected = dict(start.weights)
    for block, state in enumerate(rebuild_stage(2, before, after, "mean"), start=2 * (rank - 1)):
        expected |= {f"model.blocks.{block}.{name}": tensor for name, tensor in state.items()}
    assert_same_weights(result.weights, expected)
    assert_counted(result)


@pytest.mark.slow
def test_experts_of_neighbours_are_paired_before_they_are_averaged() -> None:
    settings = {"optimizer": lambda parameters: SGD(parameters, lr=0.0), "net": Own, "stages": 4}
    result, _ = run(At("on_train_batch_start", 3, kill(2)), recovery=StageRecovery(rule="mean"), **settings)
    start, _ = run(**settings)
    before, after = (_block(start, block) for block in (0, 2))
    mixed = [name for name in before if name.startswith(("moe.experts.", "moe.routers."))]

    def likeness(order: tuple[int, ...]) -> float:
        rows = [
            (before[name].flatten(1), after[name][list(order)].flatten(1)) for name in mixed if before[name].ndim > 1
        ]
        return sum(float(nn.functional.cosine_similarity(a, b).sum()) for a, b in rows)

    best = list(max(permutations(range(4)), key=likeness))
    assert best != [0, 1, 2, 3]
    after |= {name: after[name][best] for name in mixed}
    expected = {f"model.blocks.1.{name}": (tensor + after[name]) / 2 for name, tensor in before.items()}
    assert_same_weights(result.weights, start.weights | expected)
    assert_counted(result)


def _block(of: Run, block: int) -> dict[str, Tensor]:
    prefix = f"model.blocks.{block}."
    return {name.removeprefix(prefix): t for name, t in of.weights.items() if name.startswith(prefix)}


def test_paths_go_around_a_stage_that_has_no_replacement_yet() -> None:
    recovery = StageRecovery(spares=0, while_missing="skip")
    stop_workers()  # idle ones of runs before would take over at once
    # Without spares a replacement must start first, which takes longer than what is left of the run.
    result, _ = run(At("on_train_batch_start", 3, kill(2)), recovery=recovery)
    assert_counted(result)
    assert [event.source for event in recovery.events] == ["neighbours"]  # for the weights at the end
    assert recovery.events[0].steps_around >= 1
    assert not any(torch.isnan(tensor).any() for tensor in result.weights.values())


def test_an_exception_in_a_worker_still_ends_the_run() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), 0

        def forward(self, hidden: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 5:
                raise ArithmeticError("the sixth call is one too many")
            return self.linear(hidden)

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Broken(), Broken()])

        def training_step(self, batch: Tensor) -> Tensor:
            for layer in self.layers:
                batch = layer(batch)
            return batch.square().mean()

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters())

    recovery = StageRecovery(spares=0)
    with pytest.raises(ArithmeticError, match="one too many"):
        train(Small, loader(torch.randn(64, 4), 4), 3, {"num_microbatches": 4}, callbacks=[recovery], max_steps=16)
    assert not recovery.events


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="spares=-1"):
        StageRecovery(spares=-1)
    with pytest.raises(ValueError, match="rule='best' is unknown"):
        StageRecovery(rule="best")
    with pytest.raises(ValueError, match="while_missing='stop' is unknown"):
        StageRecovery(while_missing="stop")
    with pytest.raises(TypeError, match="this Trainer runs SingleDeviceStrategy"):
        train(lambda: Counting(Transformer(depth=2), sgd), loader(tokens(8), 4), 1, callbacks=[StageRecovery()])


# ----------------------------------------------------------------- slow ones


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "delay_s"),
    [
        ("on_train_batch_start", 0.0),
        ("on_train_batch_start", 0.03),
        ("on_before_zero_grad", 0.0),
        ("on_before_backward", 0.0),
        ("on_after_backward", 0.0),
        ("on_before_optimizer_step", 0.0),
        ("on_train_batch_end", 0.0),
        ("on_validation_start", 0.0),
        ("on_validation_batch_start", 0.0),
        ("on_validation_batch_end", 0.0),
        ("on_save_checkpoint", 0.0),
        ("on_train_end", 0.0),
    ],
)
@pytest.mark.parametrize("ranks", [(1,), (2, 3)])
def test_whenever_it_happens(hook: str, delay_s: float, ranks: tuple[int, ...], tmp_path) -> None:
    recovery = StageRecovery(spares=len(ranks))
    result, _ = run(
        At(hook, 1 if hook in ("on_train_end", "on_save_checkpoint") else 2, kill(*ranks), delay_s),
        recovery=recovery,
        val_data=loader(tokens(8), BATCH),
        val_check_interval=4,
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        gradient_clip_val=0.5,
    )
    assert_counted(result)
    assert sorted(event.rank for event in recovery.events) == sorted(ranks)
    assert not any(torch.isnan(tensor).any() for tensor in result.weights.values())


@pytest.mark.slow
def test_a_paused_worker_is_replaced_and_fenced() -> None:
    recovery = StageRecovery(heartbeat_s=2.0)
    result, _ = run(At("on_train_batch_start", 3, kill(2, how=signal.SIGSTOP)), recovery=recovery)
    assert_counted(result)
    assert "no sign of life" in recovery.events[0].how_lost


@pytest.mark.slow
def test_a_second_loss_during_the_recovery() -> None:
    """The spare dies as it takes over: the next one does."""

    class Second(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and not recovery.events:
                spare, *_ = trainer.strategy.spare_pids  # there may be more, of earlier runs
                threading.Timer(0.05, os.kill, [spare, signal.SIGKILL]).start()
                kill(2)(trainer)

    recovery = StageRecovery()
    result, _ = run(Second(), recovery=recovery)
    assert_counted(result)
    assert recovery.events


@pytest.mark.slow
def test_the_step_after_a_recovery_is_drawn_with_a_mark(tmp_path) -> None:
    monitor = PipelineMonitor(every_n_steps=1000, folder=tmp_path, trace=True)
    run(At("on_train_batch_start", 3, kill(2)), monitor, recovery=StageRecovery())
    assert (tmp_path / "pipeline-step000003.png").exists()
    trace = json.loads((tmp_path / "pipeline-step000003.trace.json").read_text())
    (mark,) = [event for event in trace["traceEvents"] if event["ph"] == "i"]
    assert mark["pid"] == 2
    assert mark["name"].startswith("neighbours, ")
