"""A pipeline whose processes have a device each gives what one device gives."""

import gc
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.e2e.models import Transformer, tokens
from tests.e2e.modules import BATCH, STEPS, LanguageModel, loader
from tests.e2e.support import Run, assert_same_run, train
from tests.grids import slow


def _run(devices: int, **options: Any) -> Run:
    return train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH * STEPS)), devices, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", slow("16-mixed")])
def test_a_pipeline_gives_what_one_device_gives(precision: str) -> None:
    rtol = 1e-5 if precision == "32-true" else 0.03
    pipeline, alone = _run(3, precision=precision), _run(1, precision=precision)
    assert pipeline.trainer.strategy.root_device == alone.trainer.strategy.root_device == torch.device("sim:0")
    assert_same_run(pipeline, alone, rtol=rtol, weights_rtol=10 * rtol, weights_atol=rtol)


class Reading(Callback):
    """Reads and writes what the workers hold, beside tensors of the driver's device."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        weight = module.model.blocks[-1].norm1.weight
        assert weight.device == module.device
        with torch.no_grad():
            weight.mul_(torch.full_like(weight, 0.9)).add_(torch.ones(len(weight), device=module.device), alpha=0.1)
            module.model.blocks[0].norm1.bias.copy_(torch.full((len(weight),), 0.01, device=module.device))
        self.seen.append(float((weight + torch.ones(len(weight), device=module.device)).sum()))

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        norms = torch.stack([parameter.grad.norm() for parameter in module.parameters()])  # of driver and workers
        self.seen.append(float(norms.norm()))


def test_what_workers_hold_is_seen_on_the_drivers_device() -> None:
    found, expected = Reading(), Reading()
    assert_same_run(_run(3, callbacks=[found]), _run(1, callbacks=[expected]))
    torch.testing.assert_close(torch.tensor(found.seen), torch.tensor(expected.seen))


def test_nothing_stays_in_the_memory_of_the_driver() -> None:
    gc.collect()
    before = torch.sim.memory_allocated(0)
    torch.sim.reset_peak_memory_stats(0)
    run = _run(3)
    assert torch.sim.max_memory_allocated(0) > before
    del run
    gc.collect()
    assert torch.sim.memory_allocated(0) == before
