"""No process holds anything of a run that is over, however it ended: what it took is given back to the host."""

import functools
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from skippipe_plugin.accelerate import SkipPipeAccelerator
from skippipe_plugin.strategies import stop_workers
from skippipe_plugin.worker.memory import give_back
from tests.grids import slow

from .support import trainer_for

_SMALL, _LARGE = 8, 1800
_ALLOWED = 20 << 20
_CONFIG = SkipPipeConfig(num_stages=2, num_microbatches=2, verbose=False)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 4)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.embed(rows)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Module(LightningModule):
    def __init__(self, width: int, fails: bool = False) -> None:
        super().__init__()
        self.net = Net(width)
        self.fails = fails

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        if self.fails and number == 1:
            raise ValueError("of the user")
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def _data() -> DataLoader[Tensor]:
    return DataLoader(torch.randn(16, 8), batch_size=8)


def a_fit(width: int) -> None:
    trainer_for(3, {"num_microbatches": 2}, max_steps=2).fit(Module(width), _data())


def a_failed_fit(width: int) -> None:
    with pytest.raises(ValueError, match="of the user"):
        trainer_for(3, {"num_microbatches": 2}, max_steps=2).fit(Module(width, fails=True), _data())


def a_plain_loop(width: int) -> None:
    model = Net(width)
    optimizer = torch.optim.AdamW(model.parameters())
    with TorchPipeline(model, optimizer, _CONFIG) as pipeline:
        for batch in _data():
            optimizer.zero_grad()
            pipeline.run(lambda rows: model(rows).square().mean(), batch).backward()
            optimizer.step()


def a_loop_of_calls(width: int) -> None:
    model = Net(width)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with TorchPipeline(model, optimizer, _CONFIG):
        for batch in _data():
            model(batch).square().mean().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    del scheduler.optimizer  # torch's own circle


def free_memory(width: int) -> None:
    accelerator: Accelerator = SkipPipeAccelerator(_CONFIG, cpu=True)
    model = Net(width)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for batch in _data():
        optimizer.zero_grad()
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
    accelerator.free_memory(model, optimizer)


@pytest.mark.alone
@pytest.mark.parametrize("run", [a_fit, slow(a_failed_fit), a_plain_loop, slow(free_memory)])
def test_what_a_run_took_is_given_back(run: Callable[[int], None]) -> None:
    stop_workers()  # with others left of tests before, the second run would have other ones than the first
    run(_SMALL)
    processes = [psutil.Process(), *psutil.Process().children()]
    give_back(torch.device("cpu"))  # as workers do by themselves: models and Trainers go round in circles
    before = [process.memory_info().rss for process in processes]
    run(_LARGE)
    deadline_s = time.monotonic() + 20.0  # a worker rests first, and collects for long on a busy machine
    while True:
        give_back(torch.device("cpu"))
        grown = [process.memory_info().rss - then for process, then in zip(processes, before, strict=True)]
        if max(grown) < _ALLOWED or time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    assert max(grown) < _ALLOWED


@pytest.mark.parametrize("run", [a_plain_loop, a_loop_of_calls, free_memory])
def test_what_a_loop_had_goes_with_it(run: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[object]] = []
    for kind in (Net, torch.optim.AdamW):
        monkeypatch.setattr(kind, "__init__", _noting(kind.__init__, made))
    gc.disable()  # memory of a device is needed at once
    try:
        run(_SMALL)
        assert [each() for each in made] == [None] * 2
    finally:
        gc.enable()


def _noting(original: Callable[..., None], made: list[weakref.ref[object]]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: object, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    return init


class Labelled(Module):
    def training_step(self, batch: Any, number: int) -> Tensor:
        rows, targets = batch
        return nn.functional.mse_loss(self.net(rows), targets)


class Cycles(Callback):
    """Collects what steps have left behind that only Python's collector finds."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, number: int) -> None:
        if number == 4:  # what is asked and learned in the first ones is over
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        gc.collect()
        self.found = [f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage]
        gc.garbage.clear()


def test_a_step_is_freed_without_the_collector() -> None:
    """Its batch would stay until Python looks for cycles, which takes long where much is alive."""
    cycles = Cycles()
    data = DataLoader(TensorDataset(torch.randn(64, 8), torch.randn(64, 4)), batch_size=8)
    try:
        trainer_for(3, {"num_microbatches": 2}, max_steps=8, callbacks=[cycles]).fit(Labelled(_SMALL), data)
    finally:
        gc.set_debug(0)
        gc.enable()
    left = [each for each in cycles.found if each.startswith(("skippipe_plugin", "torch.Tensor"))]
    assert left == [], sorted(set(cycles.found))
