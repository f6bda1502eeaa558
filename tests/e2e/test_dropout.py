"""Randomness inside the blocks is the same for any number of workers, schedule and placement."""

import functools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from .models import Transformer, tokens
from .modules import BATCH, STEPS, LanguageModel, Pretrained, loader
from .support import Run, assert_same_run, train
from .zoo import gpt2, language

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "two_workers": (3, {"schedule": "gpipe"}),
    "two_workers_1f1b": (3, {"schedule": "1f1b"}),
    "three_workers": (4, {"schedule": "gpipe"}),
    "three_workers_1f1b": (4, {"schedule": "1f1b"}),
    "driver_stage": (3, {"driver_stage": True}),
    "driver_stage_gpipe": (2, {"driver_stage": True, "schedule": "gpipe"}),
    "alone": (1, {"driver_stage": True}),
    "replicas": (3, {"replicas": 2}),
}


def _run(case: str, devices: int, strategy: dict[str, Any]) -> Run:
    strategy = {"num_microbatches": 4, **strategy}
    if case == "transformer":
        return train(lambda: LanguageModel(Transformer(dropout=0.2)), loader(tokens(BATCH * STEPS)), devices, strategy)
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return train(lambda: Pretrained(gpt2(**dropout)), loader(language(BATCH * STEPS)), devices, strategy)


@functools.cache
def _one_worker(case: str) -> Run:
    return _run(case, 2, {"schedule": "1f1b"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_the_same_in_every_layout(layout: str) -> None:
    assert_same_run(_run("transformer", *LAYOUTS[layout]), _one_worker("transformer"), rtol=1e-6)


@pytest.mark.parametrize("layout", ["three_workers_1f1b", "driver_stage"])
def test_dropout_of_transformers(layout: str) -> None:
    assert_same_run(_run("gpt2", *LAYOUTS[layout]), _one_worker("gpt2"), rtol=1e-6)


def test_dropout_changes_from_step_to_step_and_with_the_seed() -> None:
    batches = [tokens(BATCH)] * 3
    data = DataLoader(batches, batch_size=None)

    def losses(seed: int) -> list[float]:
        def make() -> LanguageModel:
            torch.manual_seed(0)
            model = LanguageModel(Transformer(dropout=0.5), lambda module: torch.optim.SGD(module.parameters(), lr=0.0))
            torch.manual_seed(seed)
            return model

        return train(make, data, 2, {"num_microbatches": 2}, max_steps=3).losses

    first = losses(1)
    assert len(set(first)) == 3
    assert losses(1) == first
    assert not set(losses(2)) & set(first)
