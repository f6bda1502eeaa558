"""Randomness inside the blocks is the same for any number of workers, schedule and placement, losses and resumes."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from skippipe_plugin.callbacks import StageRecovery
from tests.grids import all_slow_but, slow

from .models import Transformer, tokens
from .modules import BATCH, STEPS, LanguageModel, Pretrained, loader
from .support import Run, assert_same_run, train
from .test_recovery import At, Ready, kill
from .test_recovery_accumulation import alike
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


@pytest.mark.parametrize(
    "layout", all_slow_but(LAYOUTS, "two_workers_1f1b", "three_workers_1f1b", "driver_stage_gpipe", "replicas")
)
def test_dropout_is_the_same_in_every_layout(layout: str) -> None:
    assert_same_run(_run("transformer", *LAYOUTS[layout]), _one_worker("transformer"), rtol=1e-6)


@pytest.mark.parametrize("layout", ["three_workers_1f1b", slow("driver_stage")])
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


# ------------------------------------------------------------- to the last bit, with losses of workers and resumes

EPOCH = 4
SIX = ("two_workers", "two_workers_1f1b", "three_workers", "three_workers_1f1b", "driver_stage", "replicas")


def _make() -> LanguageModel:
    """Blocks that are alike: until the first optimizer step a rebuilt stage is what the lost one was."""
    return LanguageModel(alike(dropout=0.2), lambda module: torch.optim.SGD(module.parameters(), lr=0.1))


def _fit(layout: str, epochs: int = 2, **options: Any) -> Run:
    """Take an optimizer step after each second batch."""
    devices, strategy = LAYOUTS[layout]
    usual = {"accumulate_grad_batches": 2, "max_epochs": epochs, "max_steps": -1}
    data = loader(tokens(BATCH * EPOCH))
    return train(_make, data, devices, {"num_microbatches": 4, **strategy}, **usual, **options)


@functools.cache
def _expected(replicas: bool) -> list[float]:
    """Return what is the same to the last bit in all layouts; a sum over replicas is rounded in another order."""
    losses = _fit("replicas" if replicas else "two_workers").losses
    assert len(set(losses)) == 2 * EPOCH
    return losses


@pytest.mark.parametrize("layout", all_slow_but(SIX[1:], "three_workers", "driver_stage", "replicas"))
def test_all_layouts_have_equal_losses(layout: str) -> None:
    if layout == "replicas":
        assert _expected(True) == pytest.approx(_expected(False), rel=1e-6)
    else:
        assert _fit(layout).losses == _expected(False)


@pytest.mark.parametrize("layout", all_slow_but(SIX, "two_workers_1f1b", "driver_stage", "replicas"))
def test_neither_a_lost_worker_nor_a_resume_changes_a_loss(layout: str, tmp_path: Path) -> None:
    """The resume is in another layout, where the sums are the same."""
    recovery = StageRecovery(rule="mean", lr_factor=1.0, spares=1)
    first = _fit(layout, epochs=1, callbacks=[recovery, At("on_train_batch_start", 2, kill(1)), Ready()])
    (event,) = recovery.events
    assert (event.source == "replica") == (layout == "replicas")
    first.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    expected = _expected(layout == "replicas")
    assert first.losses == expected[:EPOCH]
    other = layout if layout == "replicas" else SIX[(SIX.index(layout) + 1) % 5]
    assert _fit(other, ckpt_path=str(tmp_path / "saved.ckpt")).losses == expected[EPOCH:]
