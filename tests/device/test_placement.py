"""Each process computes on its own device, and what travels is there where it was in one process."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from skippipe_plugin.strategies import NetworkConfig
from skippipe_plugin.strategies.replay import random_state, set_random_state
from tests.e2e.models import TanhBlock, Transformer, next_token_loss, tokens
from tests.e2e.modules import BATCH, STEPS, LanguageModel, loader
from tests.e2e.support import assert_same_run, train
from tests.grids import slow

pytestmark = pytest.mark.timeout(400)


class Devices(Callback):
    """Notes what each worker computes on."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        strategy: Any = trainer.strategy
        self.found = [link.device for link in strategy._spread.links]


@pytest.mark.parametrize(("devices", "share", "expected"), [(3, 1, ["sim:1", "sim:2"]), (1, 3, ["sim:0", "sim:0"])])
def test_each_worker_has_a_device(devices: int, share: int, expected: list[str]) -> None:
    noted, data = Devices(), loader(tokens(BATCH * STEPS))
    network = NetworkConfig(workers_per_device=share)
    ours = train(lambda: LanguageModel(Transformer()), data, devices, {"network": network}, callbacks=[noted])
    assert noted.found == expected
    assert_same_run(ours, train(lambda: LanguageModel(Transformer()), data, 1))


class Particular(TanhBlock):
    """A block that minds where things are, as packed sequences and custom kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.tensor([0.5, 1.0])
        self.scale = torch.full((8,), 0.5, device="sim:0")  # neither parameter nor buffer, as an earlier call caches

    def forward(self, hidden: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        places = [each.device for each in (hidden, weights, self.scale, self.linear.weight)]
        if {lengths.device.type, self.table.device.type} != {"cpu"} or len({*places}) > 1:
            raise RuntimeError(f"not where they were: {lengths.device}, {self.table.device}, {places}")
        made = torch.ones(8, device="sim")  # where the process computes
        return hidden + torch.tanh(self.linear(hidden)) * self.scale * made * weights * self.table[int(lengths[0] > 2)]


class Minding(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Particular() for _ in range(3))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        hidden, lengths = self.embed(batch), torch.full((len(batch),), 3)
        for block in self.blocks:
            hidden = block(hidden, lengths, torch.linspace(0.5, 1.5, 8, device=self.device))
        return self.head(hidden).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.parametrize("strategy", [{}, slow({"driver_stage": True})])
def test_what_is_on_the_host_stays_there(strategy: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    data = DataLoader([torch.randn(8, 4, generator=generator) for _ in range(STEPS)], batch_size=None)
    assert_same_run(train(Minding, data, 3, strategy), train(Minding, data, 1))


class Making(TanhBlock):
    """A block that makes a tensor without saying where."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden)) * torch.full((8,), 0.5)


class Unnamed(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Making() for _ in range(2))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        with torch.device(self.device):
            return self.head(nn.Sequential(*self.blocks)(self.embed(batch))).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_tensors_are_made_where_the_step_says() -> None:
    generator = torch.Generator().manual_seed(0)
    data = DataLoader([torch.randn(8, 4, generator=generator) for _ in range(STEPS)], batch_size=None)
    assert_same_run(train(Unnamed, data, 3), train(Unnamed, data, 1))


def test_a_loops_model_is_whole_on_its_device_afterwards() -> None:
    def losses(pipeline: bool) -> list[float]:
        torch.manual_seed(0)
        model = Transformer().to("sim:0")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        found = []

        def step(ids: Tensor) -> None:
            loss = next_token_loss(model(ids), ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss))

        batches = tokens(BATCH * 4).to("sim:0").split(BATCH)
        if pipeline:
            with TorchPipeline(model, optimizer, SkipPipeConfig(num_stages=2)):
                for batch in batches[:2]:
                    step(batch)
        for batch in batches[2 * pipeline :]:
            step(batch)
        states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        assert {tensor.device for tensor in (*model.parameters(), *model.buffers(), *states)} == {torch.device("sim:0")}
        return found

    assert losses(pipeline=True) == pytest.approx(losses(pipeline=False), rel=1e-5)


def test_what_all_devices_draw_is_put_back() -> None:
    """As a driver that starts again needs it."""
    state = random_state([])
    drawn = [torch.rand(3, device=device) for device in ("cpu", "sim:0", "sim:5")]
    set_random_state(state, [])
    for one, device in zip(drawn, ("cpu", "sim:0", "sim:5"), strict=True):
        assert torch.equal(one, torch.rand(3, device=device))
