"""Faults at random, over and over: no hang, no failed recovery, every sample used once."""

from pathlib import Path

import pytest
import torch

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.testing import Injector, random_faults

from .models import Transformer, tokens
from .modules import loader
from .support import train
from .test_recovery import Counting, Ready

BATCH = 4
VALIDATION = 8


def soak(seed: int, steps: int, every: int, folder: Path, *kinds: str) -> tuple[Injector, StageRecovery]:
    """Train with random faults, and check that nothing but weights came out different."""
    faults = random_faults(seed, range(2, steps - 1, every), num_workers=3, kinds=kinds)
    recovery, rows = StageRecovery(spares=2, heartbeat_s=3.0), tokens(steps * BATCH)
    with Injector(*faults, seed=seed) as injector:
        result = train(
            lambda: Counting(Transformer(depth=6), lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)),
            loader(rows, BATCH),
            4,
            {"num_microbatches": 4},
            seed=seed,
            max_epochs=1,
            max_steps=-1,
            callbacks=[recovery, Ready(2)],
            val_data=loader(rows[:VALIDATION], BATCH),
            val_check_interval=4,
            num_sanity_val_steps=0,
            enable_checkpointing=True,
            default_root_dir=folder,
        )
    print(*injector.report, *recovery.events, sep="\n")
    assert result.trainer.global_step == len(result.losses) == steps
    assert result.module.seen == [steps * BATCH]
    assert float(result.module.validated.compute()) == steps // 4 * VALIDATION
    assert not any(torch.isnan(tensor).any() for tensor in result.weights.values())
    return injector, recovery


def test_a_few_random_kills(tmp_path: Path) -> None:
    injector, recovery = soak(0, 12, 4, tmp_path, "kill")
    assert injector.num_done
    assert recovery.events


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
def test_a_soak_of_random_faults(seed: int, tmp_path: Path) -> None:
    injector, recovery = soak(seed, 120, 6, tmp_path, "kill", "stop", "cut", "reset", "refuse")
    assert injector.num_done >= 18
    assert recovery.events
