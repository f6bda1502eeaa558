"""Kill workers at random, over and over: no hang, no failed recovery, every sample used once."""

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.callbacks import StageRecovery

from .models import Transformer, tokens
from .modules import loader
from .support import train
from .test_recovery import Counting, await_spare

BATCH = 4
VALIDATION = 8


class ChaosMonkey(Callback):
    """Kills a random worker (or two, or a spare) at a random moment of every few steps, once there is a spare.

    Some of these moments lie in validation, or while a checkpoint is written. Never are all three stages lost at once.
    """

    def __init__(self, seed: int, every: int) -> None:
        self.random = random.Random(seed)
        self.every = every
        self.kills: list[str] = []
        """By kill: what the run was doing."""
        self._due = ""
        self._killed: set[int] = set()
        self._timers: list[threading.Timer] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step:
            self._due = self.random.choice(["training", "training", "validation", "checkpoint"])
        self._reached("training", trainer)

    def on_validation_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._reached("validation", trainer)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self._reached("checkpoint", trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for timer in self._timers:
            timer.join()

    def _reached(self, what: str, trainer: Trainer) -> None:
        workers = trainer.strategy.worker_pids.values()
        if what != self._due or any(timer.is_alive() for timer in self._timers) or not all(map(self._lives, workers)):
            return
        self._due = ""
        await_spare(trainer)
        for _ in range(self.random.choice([1, 1, 2])):
            longest_s = 0.15 if what == "training" else 0.03
            timer = threading.Timer(self.random.uniform(0.0, longest_s), self._kill, [trainer, what])
            timer.start()
            self._timers.append(timer)

    def _kill(self, trainer: Trainer, what: str) -> None:
        victims = list(filter(self._lives, [*trainer.strategy.worker_pids.values(), *trainer.strategy.spare_pids]))
        if victims:
            victim = self.random.choice(victims)
            self._killed.add(victim)  # a busy machine takes its time to end what was killed
            os.kill(victim, signal.SIGKILL)
            self.kills.append(what)

    def _lives(self, pid: int) -> bool:
        try:
            return pid not in self._killed and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def soak(seed: int, steps: int, every: int, folder: Path) -> tuple[ChaosMonkey, StageRecovery]:
    """Train with random kills, and check that nothing but weights came out different."""
    monkey, recovery = ChaosMonkey(seed, every), StageRecovery(spares=2)
    rows = tokens(steps * BATCH)
    result = train(
        lambda: Counting(Transformer(depth=6), lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)),
        loader(rows, BATCH),
        4,
        {"num_microbatches": 4},
        seed=seed,
        max_epochs=1,
        max_steps=-1,
        callbacks=[monkey, recovery],
        val_data=loader(rows[:VALIDATION], BATCH),
        val_check_interval=every,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    print(f"seed {seed}: {len(monkey.kills)} kills, {len(recovery.events)} recoveries: {monkey.kills}")
    assert result.trainer.global_step == len(result.losses) == steps
    assert result.module.seen == [steps * BATCH]
    assert float(result.module.validated.compute()) == steps // every * VALIDATION
    assert not any(torch.isnan(tensor).any() for tensor in result.weights.values())
    return monkey, recovery


def test_a_few_random_kills(tmp_path: Path) -> None:
    monkey, recovery = soak(seed=0, steps=12, every=4, folder=tmp_path)
    assert monkey.kills
    assert recovery.events


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
def test_a_soak_of_random_kills(seed: int, tmp_path: Path) -> None:
    monkey, recovery = soak(seed, steps=240, every=10, folder=tmp_path)
    assert len(monkey.kills) >= 18
    assert set(monkey.kills) == {"training", "validation", "checkpoint"}
    assert recovery.events
