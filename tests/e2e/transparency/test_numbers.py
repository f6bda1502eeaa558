"""What a Trainer says of its devices and its steps is what that of one process says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from tests.e2e.models import mlp
from tests.e2e.modules import Classifier, loader, points
from tests.e2e.support import assert_same_run, train, trainer_for
from tests.grids import slow

NUMBERS: dict[str, Callable[[Trainer], Any]] = {
    "num_devices": lambda trainer: trainer.num_devices,
    "device_ids": lambda trainer: trainer.device_ids,
    "num_nodes": lambda trainer: trainer.num_nodes,
    "world_size": lambda trainer: trainer.world_size,
    "global_rank": lambda trainer: trainer.global_rank,
    "local_rank": lambda trainer: trainer.local_rank,
    "node_rank": lambda trainer: trainer.node_rank,
    "is_global_zero": lambda trainer: trainer.is_global_zero,
    "num_training_batches": lambda trainer: trainer.num_training_batches,
    "estimated_stepping_batches": lambda trainer: trainer.estimated_stepping_batches,
    "accumulate_grad_batches": lambda trainer: trainer.accumulate_grad_batches,
    "root_device": lambda trainer: trainer.strategy.root_device,
    "strategy.world_size": lambda trainer: getattr(trainer.strategy, "world_size", 1),
    "strategy.is_global_zero": lambda trainer: trainer.strategy.is_global_zero,
    "batch_size": lambda trainer: trainer.train_dataloader.batch_size,
    "sampler": lambda trainer: type(trainer.train_dataloader.sampler),
    "reduced": lambda trainer: float(trainer.strategy.reduce(torch.tensor(3.0))),
    "gathered": lambda trainer: tuple(trainer.lightning_module.all_gather(torch.ones(2)).shape),
}


class Asks(Callback):
    """Notes all numbers when training starts."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.said = {name: ask(trainer) for name, ask in NUMBERS.items()}


@pytest.mark.parametrize("settings", [{}, {"driver_stage": True}, {"num_microbatches": 1}])
def test_all_numbers_are_those_of_one_process(settings: dict[str, Any]) -> None:
    said = []
    for devices in (1, 3):
        asks = Asks()
        strategy = {"verbose": False, **settings} if devices > 1 else None
        train(lambda: Classifier(mlp()), loader(points(24)), devices, strategy, max_steps=2, callbacks=[asks])
        said.append(asks.said)
    assert said[1] == said[0]


def test_several_drivers_are_as_many_devices() -> None:
    trainer = trainer_for(4, {"drivers": 2, "verbose": False})
    assert trainer.num_devices == trainer.world_size == 2
    assert trainer.strategy.num_processes == 4
    assert trainer.strategy.num_stages == 2


@pytest.mark.parametrize("nodes", [1, 2])
def test_nodes_without_drivers_are_not_counted(nodes: int) -> None:
    trainer = trainer_for(2, {"verbose": False}, num_nodes=nodes)
    assert (trainer.num_nodes, trainer.num_devices, trainer.world_size) == (1, 1, 1)
    assert trainer.strategy.num_processes == 2 * nodes


class Decays(Classifier):
    """Divides its steps by what the Trainer says of its devices, as many examples do."""

    def configure_optimizers(self) -> Any:
        trainer = self.trainer
        optimizer = SGD(self.parameters(), lr=0.1)
        steps = 24 // (8 * trainer.accumulate_grad_batches * trainer.num_devices * trainer.num_nodes) * 3
        decay = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


class OneCycle(Classifier):
    """Asks for the number of its steps."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        cycle = OneCycleLR(optimizer, 0.2, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


@pytest.mark.parametrize("kind", [Decays, OneCycle])
@pytest.mark.parametrize("accumulate", [slow(1), 3])
def test_schedules_that_follow_from_them(kind: type[Classifier], accumulate: int) -> None:
    options = {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": accumulate}
    found, expected = (
        train(lambda: kind(mlp()), loader(points(24)), devices, settings, **options)
        for devices, settings in ((3, {"num_microbatches": 4, "verbose": False}), (1, None))
    )
    assert_same_run(found, expected)
