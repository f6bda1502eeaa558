"""What only an accelerator can show: ``pytest -m gpu`` where there is one, ``pytest -m gpu --device sim`` anywhere.

With one device all processes share it, so that every test but NCCL's runs on a machine with one GPU.
"""

import functools
import gc
import os
import signal
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.schedule import Op
from skippipe_plugin.strategies import NetworkConfig, stop_workers

from . import loops
from .models import Transformer, tokens
from .modules import BATCH, STEPS, LanguageModel, loader
from .support import Run, assert_same_run, train
from .test_dropout import LAYOUTS

KIND = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "")
ACCELERATOR = "gpu" if KIND == "cuda" else KIND
"""As the Trainer calls it."""
NUM_DEVICES = torch.accelerator.device_count() if KIND else 0
MOST = 4
"""Processes of the largest layout."""
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not NUM_DEVICES, reason="needs an accelerator"),
]
on_cuda = pytest.mark.skipif(KIND != "cuda", reason="needs CUDA")
needs_two = pytest.mark.skipif(KIND != "cuda" or NUM_DEVICES < 2, reason="needs two GPUs")
needs_three = pytest.mark.skipif(KIND != "cuda" or NUM_DEVICES < 3, reason="needs three GPUs")


def fit(
    processes: int,
    strategy: dict[str, Any] | None = None,
    *,
    net: Any = Transformer,
    share: bool = False,
    **options: Any,
) -> Run:
    """Train over so many processes: each on a device of its own, or all on one, also where there are too few."""
    network = NetworkConfig(workers_per_device=processes if share or NUM_DEVICES < MOST else 1)
    devices = 1 if network.workers_per_device > 1 else processes
    settings = {"network": network, "num_microbatches": 4, **(strategy or {})} if processes > 1 or strategy else None
    data = loader(tokens(BATCH * STEPS))
    return train(lambda: LanguageModel(net()), data, devices, settings, **{"accelerator": ACCELERATOR, **options})


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_pipeline_gives_what_one_device_gives(precision: str, share: bool) -> None:
    rtol = 1e-4 if precision == "32-true" else 0.03
    alone, pipeline = fit(1, precision=precision), fit(3, share=share, precision=precision)
    assert pipeline.trainer.strategy.root_device.type == KIND
    assert_same_run(pipeline, alone, rtol=rtol, weights_rtol=10 * rtol, weights_atol=rtol)


def test_a_loop_whose_workers_share_a_device() -> None:
    loops.assert_same(*loops.both(loops.quicktour, cpu=False), rtol=1e-4)


Dropping = functools.partial(Transformer, dropout=0.2)


@functools.cache
def _dropping(layout: str) -> list[float]:
    return fit(*LAYOUTS[layout], net=Dropping).losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_the_same_in_every_layout(layout: str) -> None:
    """Layouts differ in what runs beside what, and a device may add up in another order then: not to the bit."""
    assert _dropping(layout) == pytest.approx(_dropping("two_workers"), rel=1e-4)


class Killing(Callback):
    """Kills a worker before a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            strategy: Any = trainer.strategy
            os.kill(strategy.worker_pids[1], signal.SIGKILL)


def test_a_lost_worker_is_replaced_and_replicas_lose_nothing() -> None:
    lossy = fit(5, {"replicas": 2}, net=Dropping, callbacks=[StageRecovery(spares=1), Killing(2)])
    undisturbed = fit(5, {"replicas": 2}, net=Dropping)
    assert lossy.losses == pytest.approx(undisturbed.losses, rel=1e-4)


class Heavy(nn.Module):
    """A block that computes for a while, and does not depend on how fast kernels are started."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(512, 512), times

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(self.times):
            hidden = hidden + torch.tanh(self.linear(hidden))
        return hidden


class Uneven(nn.Module):
    """Two blocks, of which the second takes four times as long."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 512), nn.Linear(512, 32)
        self.blocks = nn.ModuleList([Heavy(8), Heavy(32)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def test_what_is_measured_is_what_devices_take_and_not_what_starting_takes() -> None:
    class Measuring(Callback):
        costs: Any = None

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            strategy: Any = trainer.strategy
            strategy._spread.pipeline.measure_next = True

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            strategy: Any = trainer.strategy
            self.costs = strategy._spread.pipeline.timeline

    measuring = Measuring()
    fit(3, net=Uneven, callbacks=[measuring])
    took: dict[int, list[float]] = {1: [], 2: []}
    for event in measuring.costs.events:
        if event.action.stage in took and event.action.op is Op.F:
            took[event.action.stage].append(event.end_s - event.start_s)
    assert 2 < min(took[2]) / min(took[1]) < 8


def test_memory_is_given_back() -> None:
    def free() -> int:
        gc.collect()
        torch.accelerator.empty_cache()
        return torch.accelerator.get_memory_info()[0]

    fit(3)
    stop_workers()
    before = free()
    recovery = StageRecovery(spares=1)
    fit(3, callbacks=[recovery, Killing(1)])
    stop_workers()
    assert before - free() < 20 << 20


class Compiled(LanguageModel):
    """Compiles its blocks."""

    def __init__(self, net: nn.Module, mode: str) -> None:
        super().__init__(net)
        self.mode = mode

    def configure_model(self) -> None:
        for block in self.model.blocks:
            block.compile(mode=self.mode)


@on_cuda
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_compiled_blocks(mode: str) -> None:
    data = loader(tokens(BATCH * STEPS))
    network = NetworkConfig(workers_per_device=3)
    options: dict[str, Any] = {"accelerator": ACCELERATOR}
    ours = train(lambda: Compiled(Transformer(), mode), data, 1, {"network": network, "num_microbatches": 4}, **options)
    assert_same_run(
        ours, train(lambda: Compiled(Transformer(), mode), data, 1, **options), rtol=1e-3, weights_rtol=1e-2
    )


@needs_two
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=needs_three)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_nccl(schedule: str, processes: int) -> None:
    network = NetworkConfig(backend="nccl")
    ours = fit(processes, {"network": network, "schedule": schedule, "driver_stage": True})
    assert_same_run(ours, fit(1), rtol=1e-4, weights_rtol=1e-3, weights_atol=1e-4)


@needs_three
def test_nccl_is_left_when_a_worker_is_lost() -> None:
    recovery = StageRecovery(spares=1, while_missing="skip")
    found = fit(3, {"network": NetworkConfig(backend="nccl")}, callbacks=[recovery, Killing(2)])
    assert len(recovery.events) == 1
    assert all(map(torch.isfinite, map(torch.tensor, found.losses)))
