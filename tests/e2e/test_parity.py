"""With nothing skipped, a pipeline trains exactly as one process does: every model, schedule and number of workers."""

import functools

import pytest

from skippipe_plugin.schedule import FULL_SCHEDULES
from tests.grids import all_slow_but, slow

from .models import Transformer, mlp, tokens
from .modules import BATCH, STEPS, Classifier, LanguageModel, Pretrained, loader, points
from .support import Run, assert_same_run, train
from .zoo import ZOO

SCHEDULES = tuple(FULL_SCHEDULES)


def _run(case: str, devices: int, schedule: str = "auto") -> Run:
    samples = BATCH * STEPS
    strategy = {"schedule": schedule, "num_microbatches": 4} if devices > 1 else None
    if case == "transformer":
        return train(lambda: LanguageModel(Transformer()), loader(tokens(samples)), devices, strategy)
    if case == "mlp":
        return train(lambda: Classifier(mlp()), loader(points(samples)), devices, strategy)
    entry = ZOO[case]
    return train(lambda: Pretrained(entry.model()), loader(entry.data(samples)), devices, strategy)


@functools.cache
def _plain(case: str) -> Run:
    return _run(case, devices=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("devices", [slow(2), 3, slow(4)])
def test_a_hand_written_transformer(devices: int, schedule: str) -> None:
    assert_same_run(_run("transformer", devices, schedule), _plain("transformer"))


@pytest.mark.parametrize("case", all_slow_but(["mlp", *ZOO], "mlp", "gpt2", "mixtral", "vit", "lora"))
def test_unmodified_models(case: str) -> None:
    assert_same_run(_run(case, 3, "1f1b"), _plain(case))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("case", ["mlp", *ZOO])
def test_unmodified_models_over_everything(case: str, devices: int, schedule: str) -> None:
    assert_same_run(_run(case, devices, schedule), _plain(case))
