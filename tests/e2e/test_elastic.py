"""Workers join by hand and leave while a run goes on: the number of stages changes, and nothing else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from skippipe_plugin.callbacks import LoadBalancer, PipelineMonitor, StageRecovery
from skippipe_plugin.driver.moving import Mover
from skippipe_plugin.driver.pipeline import Pipeline
from skippipe_plugin.strategies import NetworkConfig

from . import test_kept_state
from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import Run, assert_same_run, train

STEPS = 10
BATCH = 4
DEADLINE_S = 60.0


class Scheduled(LanguageModel):
    """A tied head, a frozen block, and a learning rate that changes with every step."""

    def __init__(self, make_optimizer: Callable[[Any], Optimizer], dropout: float) -> None:
        super().__init__(Transformer(depth=6, tied=True, dropout=dropout))
        self.make_optimizer = make_optimizer
        for parameter in self.model.blocks[2].attention.parameters():
            parameter.requires_grad = False

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        scheduler = CosineAnnealingLR(optimizer, T_max=2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, eps=1e-5)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


class Play(Callback):
    """Lets workers join and leave before given batches, and waits until training will notice."""

    def __init__(self, joins: dict[int, int] | None = None, leaves: dict[int, int] | None = None) -> None:
        self.joins = joins or {}
        """By batch: how many workers join before it."""
        self.leaves = leaves or {}
        """By batch: the rank of the worker that leaves before it."""
        self.processes: list[subprocess.Popen[bytes]] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        job = trainer.strategy._job
        wait_for(lambda: not job.num_coming())
        for link in job.resting():  # what earlier tests have left would take over from who leaves, once it is awake
            job.fence(link)
        wait_for(lambda: not job.resting())

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        links = trainer.strategy._spread.links
        if batch_idx in self.joins:
            self._join(trainer, self.joins[batch_idx])
        if batch_idx in self.leaves:
            link = links[self.leaves[batch_idx]]
            os.kill(link.pid, signal.SIGTERM)
            wait_for(lambda: link.leaving)

    def _join(self, trainer: Trainer, count: int) -> None:
        job = trainer.strategy._job
        host, port = job.pool.address
        command = [sys.executable, "-m", "skippipe_plugin.cli", "worker", "--join", f"{host}:{port}"]
        environment = os.environ | {"SKIPPIPE_SECRET": job.pool.secret, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.processes += [subprocess.Popen(command, env=environment) for _ in range(count)]
        wait_for(lambda: len(job.joined()) >= count)
        trainer.strategy._spread.pipeline.keeper._warm_spares()
        wait_for(lambda: all(link.warm for link in job.idle()))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def play() -> Iterator[Callable[..., Play]]:
    plays: list[Play] = []

    def make(**happenings: dict[int, int]) -> Play:
        plays.append(Play(**happenings))
        return plays[-1]

    yield make
    for process in (process for each in plays for process in each.processes):
        process.terminate()  # without stages it ends at once; with some the run is over and has set it free
        process.wait(timeout=30)


def run(
    optimizer: Callable[[Any], Optimizer] = adamw,
    devices: int = 3,
    strategy: dict[str, Any] | None = None,
    dropout: float = 0.1,
    callbacks: Any = (),
    **options: Any,
) -> Run:
    settings = {"num_microbatches": 4, **(strategy or {})} if devices > 1 else None
    return train(
        lambda: Scheduled(optimizer, dropout),
        loader(tokens(2 * STEPS * BATCH), BATCH),
        devices,
        settings,
        callbacks=list(callbacks),
        **{"max_steps": STEPS, **options},
    )


def stages(recovery: StageRecovery) -> list[tuple[int, int]]:
    return [(move.before, move.after) for move in recovery.moves]


def test_a_run_that_grows_and_shrinks_is_that_of_a_run_that_does_not(play, tmp_path) -> None:
    """Both moves come in the middle of an accumulation; one of the first workers leaves, the joiner stays."""
    checkpoints = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "dropout": 0.0}
    recovery = StageRecovery(spares=0, elastic=True)
    moving = [recovery, play(joins={5: 1}, leaves={13: 1})]
    found = run(callbacks=moving, **options, **checkpoints)
    assert stages(recovery) == [(2, 3), (3, 2)]
    assert [move.num_blocks for move in recovery.moves] == [2, 3]  # the second time the leaver's two, and one more
    assert not recovery.events
    assert_same_run(found, run(devices=1, **options), weights_rtol=0.0)

    path = str(next(tmp_path.glob("**/*.ckpt")))
    more = {"ckpt_path": path, "max_steps": STEPS + 4, **options}
    assert_same_run(run(**more), run(devices=1, **more), weights_rtol=0.0)


# ----------------------------------------------------------------- slow ones


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_several_at_once(play, optimizer: Callable[[Any], Optimizer], schedule: str) -> None:
    recovery = StageRecovery(spares=0, elastic=True)
    settings = {"schedule": schedule}
    moving = [recovery, play(joins={2: 2, 12: 1}, leaves={6: 1, 7: 2, 8: 1})]
    found = run(optimizer, callbacks=moving, strategy=settings, max_steps=2 * STEPS)
    assert stages(recovery) == [(2, 4), (4, 3), (3, 2), (2, 1), (1, 2)]
    assert_same_run(found, run(optimizer, strategy=settings, max_steps=2 * STEPS), weights_rtol=0.0, weights_atol=1e-5)


@pytest.mark.slow
def test_replicas(play) -> None:
    """Two joiners make a stage of two replicas; when one of them leaves, its partner is free again."""
    recovery = StageRecovery(spares=0, elastic=True)
    found = run(sgd, 5, {"replicas": 2}, callbacks=[recovery, play(joins={3: 2}, leaves={8: 3})])
    assert stages(recovery) == [(2, 3), (3, 2)]
    assert_same_run(found, run(sgd, 5, {"replicas": 2}), weights_rtol=0.0, weights_atol=1e-5)


@pytest.mark.slow
def test_a_driver_keeps_its_own_stage(play) -> None:
    settings = {"driver_stage": True}
    recovery = StageRecovery(spares=0, elastic=True)
    found = run(strategy=settings, callbacks=[recovery, play(joins={3: 2}, leaves={6: 1, 8: 2})])
    assert stages(recovery) == [(3, 5), (5, 4), (4, 3)]
    assert_same_run(found, run(strategy=settings), weights_rtol=0.0, weights_atol=1e-5)


@pytest.mark.slow
def test_spares_come_first(play, tmp_path) -> None:
    """Where the driver may not start a spare itself, one of two joiners is it, and takes over from who leaves."""
    recovery = StageRecovery(spares=1, elastic=True)
    settings = {"network": NetworkConfig(local_workers=2, secret_file=str(tmp_path / "secret"))}
    found = run(strategy=settings, callbacks=[recovery, play(joins={3: 2}, leaves={6: 1})])
    assert stages(recovery) == [(2, 3)]
    assert [event.source for event in recovery.events] == ["relieved"]
    assert_same_run(found, run(), weights_rtol=0.0, weights_atol=1e-5)


@pytest.mark.slow
def test_with_paths_that_skip_and_callbacks_that_measure(play, tmp_path) -> None:
    """Plans, costs and pictures are those of the stages there are."""
    recovery = StageRecovery(spares=0, elastic=True)
    balancer = LoadBalancer(every_n_steps=2, min_gain=0.01, min_steps=1, window=1)
    monitor = PipelineMonitor(every_n_steps=3, folder=tmp_path)
    moving = [recovery, play(joins={6: 2}, leaves={13: 2}), balancer, monitor]
    found = run(devices=4, strategy={"skip_ratio": 0.3}, callbacks=moving, max_steps=2 * STEPS)
    assert stages(recovery) == [(3, 5), (5, 4)]
    assert len(found.losses) == 2 * STEPS
    assert len(list(tmp_path.glob("*.png"))) == 2 * STEPS // 3
    assert all(torch.isfinite(tensor).all() for tensor in found.weights.values())


class Kill(Callback):
    """Kills a worker (by its rank when the run begins, or the newcomer) as soon as a move has come to some point."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, point: tuple[type, str], victim: int | None) -> None:
        self.victim, self.killed = victim, False
        owner, name = point
        original = getattr(owner, name)

        def reached(this: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.killed and self.moving:
                self.killed = True
                os.kill(self.pid(), signal.SIGKILL)
            return original(this, *args, **kwargs)

        self.moving = False
        monkeypatch.setattr(owner, name, reached)
        move = Mover._move
        monkeypatch.setattr(Mover, "_move", lambda this, shape: (setattr(self, "moving", True), move(this, shape))[1])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.pids, self.pool = dict(trainer.strategy.worker_pids), trainer.strategy._job.pool

    def pid(self) -> int:
        if self.victim is not None:
            return self.pids[self.victim]
        return next(link.pid for link in self.pool.links if link.pid not in self.pids.values())


@pytest.mark.slow
@pytest.mark.parametrize("while_missing", ["wait", "skip"])
@pytest.mark.parametrize("victim", [1, 2, None])
@pytest.mark.parametrize("point", [(Mover, "_sources"), (Pipeline, "relayout"), (Mover, "finish")])
def test_a_loss_in_the_middle_of_a_move(play, monkeypatch, point: Any, victim: int | None, while_missing: str) -> None:
    recovery = StageRecovery(spares=0, elastic=True, while_missing=while_missing)
    killer = Kill(monkeypatch, point, victim)
    found = run(callbacks=[recovery, killer, play(joins={3: 1})])
    assert killer.killed
    assert found.trainer.global_step == STEPS
    assert recovery.events or point == (Mover, "_sources")
    assert all(torch.isfinite(tensor).all() for tensor in found.weights.values())


@pytest.mark.slow
def test_a_stage_that_is_lost_after_a_move_is_rebuilt(play, monkeypatch) -> None:
    class KillLater(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                os.kill(trainer.strategy.worker_pids[2], signal.SIGKILL)

    recovery = StageRecovery(spares=0, elastic=True)
    found = run(callbacks=[recovery, play(joins={3: 1}), KillLater()])
    assert stages(recovery)[0] == (2, 3)
    assert [(event.stages, event.source) for event in recovery.events] == [((2,), "neighbours")]
    assert found.trainer.global_step == STEPS


class Remembers(test_kept_state.Kept):
    """Keeps numbers, a list and a mean in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.mean: torch.Tensor | None = None

    def factor(self, hidden: torch.Tensor) -> Any:
        self.seen.append(float(hidden.mean()))
        self.mean = hidden.mean(0) if self.mean is None else 0.9 * self.mean + 0.1 * hidden.mean(0)
        return sum(self.seen) + self.mean


def remember(devices: int, *callbacks: Callback) -> Run:
    samples = torch.randn(20 * 8, 4, generator=torch.Generator().manual_seed(0))
    return train(
        lambda: test_kept_state.Module(Remembers, test_kept_state.once, manual=False),
        loader(samples, 8),
        devices,
        {"num_microbatches": 2} if devices > 1 else None,
        callbacks=callbacks,
        max_steps=20,
    )


@pytest.mark.slow
def test_what_forwards_have_written_into_attributes_moves_too(play) -> None:
    recovery = StageRecovery(spares=0, elastic=True)
    found = remember(3, recovery, play(joins={2: 1}, leaves={10: 1}))
    assert stages(recovery) == [(2, 3), (3, 2)]
    assert_same_run(found, remember(1))


class Leave(Callback):
    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            os.kill(trainer.strategy._spread.links[1].pid, signal.SIGTERM)


@pytest.mark.slow
def test_it_moves_to_who_takes_over_from_a_worker_that_leaves() -> None:
    recovery = StageRecovery(spares=1)
    found = remember(3, recovery, Leave())
    assert [event.source for event in recovery.events] == ["relieved"]
    assert_same_run(found, remember(1))
