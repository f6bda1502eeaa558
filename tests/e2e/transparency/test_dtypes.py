"""The dtypes of what blocks make follow from their context, as in one process: autocast, the default dtype."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.e2e.support import assert_same_run, train
from tests.grids import slow

WIDTH = 8


class Making(nn.Module):
    """A block that makes a tensor of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden)) * torch.linspace(0, 1, WIDTH, device=hidden.device)


class Casting(nn.Module):
    """A block whose output has the dtype of its product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(self.linear(hidden))


class Looking(Casting):
    """A block that goes by the process's default dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) * (2.0 if torch.get_default_dtype() == torch.float64 else 0.5)


class Net(LightningModule):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.sampled: list[Tensor] = []

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.embed(batch)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch).float().square().mean()

    def validation_step(self, batch: Tensor) -> Tensor:
        return self(batch).float().mean()

    def on_validation_epoch_end(self) -> None:  # where no precision's context is entered
        batch = torch.linspace(-1, 1, 8, dtype=self.embed.weight.dtype, device=self.device).view(2, 4)
        if self.embed.weight.dtype == torch.float32:
            self.sampled.append(self(batch))
            with torch.autocast(self.device.type, torch.bfloat16):
                self.sampled.append(self(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("block", [Making, Casting])
@pytest.mark.parametrize("precision", [slow("bf16-true"), "64-true", "bf16-mixed", slow("32-true")])
def test_of_blocks_in_steps_and_outside_of_precision(precision: str, block: type[nn.Module]) -> None:
    batches = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader([*batches], batch_size=None)
    options: dict[str, Any] = {"precision": precision, "max_epochs": 1, "num_sanity_val_steps": 0}
    alone, ours = (train(lambda: Net(block), data, devices, val_data=data, **options) for devices in (1, 3))
    coarse = "bf16" in precision
    assert_same_run(ours, alone, rtol=2e-2 if coarse else 1e-5, weights_rtol=0.1 if coarse else 1e-4, weights_atol=1e-2)
    assert len(ours.module.sampled) == len(alone.module.sampled)
    for found, expected in zip(ours.module.sampled, alone.module.sampled, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=1e-2)


def test_a_call_outside_of_steps_finds_what_is_set_by_then() -> None:
    class Sampling(Net):
        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            with torch.no_grad():
                self.sampled.append(self(batch[:2]))  # the default dtype is that of a step no more

    data = DataLoader([torch.ones(4, 4, dtype=torch.float64)] * 2, batch_size=None)
    ours, alone = (
        train(lambda: Sampling(Looking), data, devices, precision="64-true", max_epochs=1) for devices in (3, 1)
    )
    torch.testing.assert_close(ours.module.sampled, alone.module.sampled)


def test_optimizers_make_numbers_of_their_own_as_in_one_process() -> None:
    class Adaptive(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def on_train_end(self) -> None:
            self.state = self.optimizers().state_dict()["state"]  # type: ignore[union-attr]

    data = DataLoader([torch.ones(4, 4, dtype=torch.float64)] * 2, batch_size=None)
    ours, alone = (
        train(lambda: Adaptive(Casting), data, devices, precision="64-true", max_epochs=1) for devices in (3, 1)
    )
    torch.testing.assert_close(ours.module.state, alone.module.state)  # dtypes, too: steps are float32 in both
