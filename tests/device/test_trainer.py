"""A pipeline whose processes have a device each gives what one device gives."""

import gc
from typing import Any

import pytest
import torch

from tests.e2e.models import Transformer, tokens
from tests.e2e.modules import BATCH, STEPS, LanguageModel, loader
from tests.e2e.support import Run, assert_same_run, train


def _run(devices: int, **options: Any) -> Run:
    return train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH * STEPS)), devices, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_pipeline_gives_what_one_device_gives(precision: str) -> None:
    rtol = 1e-5 if precision == "32-true" else 0.03
    pipeline, alone = _run(3, precision=precision), _run(1, precision=precision)
    assert pipeline.trainer.strategy.root_device == alone.trainer.strategy.root_device == torch.device("sim:0")
    assert_same_run(pipeline, alone, rtol=rtol, weights_rtol=10 * rtol, weights_atol=rtol)


def test_nothing_stays_in_the_memory_of_the_driver() -> None:
    gc.collect()
    before = torch.sim.memory_allocated(0)
    torch.sim.reset_peak_memory_stats(0)
    run = _run(3)
    assert torch.sim.max_memory_allocated(0) > before
    del run
    gc.collect()
    assert torch.sim.memory_allocated(0) == before
