"""Kill workers at random, over and over: no hang, no failed recovery, every step done once."""

import os
import random
import signal
import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.callbacks import StageRecovery

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import train
from .test_recovery import await_spare

BATCH = 4
STEPS = 240


class ChaosMonkey(Callback):
    """Kills a random worker (or two, or a spare) at a random moment of every few steps, once there is a spare."""

    def __init__(self, seed: int, every: int) -> None:
        self.random = random.Random(seed)
        self.every = every
        self.kills = 0
        self._timers: list[threading.Timer] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step:
            await_spare(trainer)
            for _ in range(self.random.choice([1, 1, 2])):
                timer = threading.Timer(self.random.uniform(0.0, 0.15), self._kill, [trainer])
                timer.start()
                self._timers.append(timer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for timer in self._timers:
            timer.join()

    def _kill(self, trainer: Trainer) -> None:
        victims = [*trainer.strategy.worker_pids.values(), *trainer.strategy.spare_pids]
        if victims:
            os.kill(self.random.choice(victims), signal.SIGKILL)
            self.kills += 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_soak_of_random_kills(seed: int) -> None:
    monkey, recovery = ChaosMonkey(seed, every=12), StageRecovery(spares=2)
    rows = tokens(STEPS * BATCH)
    result = train(
        lambda: LanguageModel(Transformer(depth=6)),
        loader(rows, BATCH),
        4,
        {"num_microbatches": 4},
        seed=seed,
        max_steps=STEPS,
        callbacks=[monkey, recovery],
        val_data=loader(rows[:8], BATCH),
        val_check_interval=25,
    )
    print(f"seed {seed}: {monkey.kills} kills, {len(recovery.events)} recoveries")
    assert result.trainer.global_step == len(result.losses) == STEPS
    assert monkey.kills >= 19
    assert recovery.events
    assert not any(torch.isnan(tensor).any() for tensor in result.weights.values())
