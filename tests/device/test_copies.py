"""What a step copies between devices and the host, and how often the host waits: counted in every process."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skippipe_plugin.engine import gradients
from tests.e2e.support import train

ROWS, LENGTH, WIDTH, MICROBATCHES, DEPTH = 8, 32, 16, 4, 4
HIDDEN = ROWS * LENGTH * WIDTH * 4
"""The bytes of a batch's hidden states, and of their gradients."""
MASK, TABLE = ROWS * LENGTH * 4, LENGTH * WIDTH * 4
BATCH = ROWS * LENGTH * 4 * 4
STEPS, WARM = 5, 3
Counts = dict[str, int]
Counted = tuple[list[Counts], list[list[Counts]]]
"""By step, on the driver and on each worker."""


def _note(folder: str) -> None:
    """Write down what the current device of this process has counted."""
    import sim_device

    counts = sim_device.counts(torch.accelerator.current_device_index())
    with Path(folder, str(os.getpid())).open("a") as file:
        file.write(json.dumps(counts) + "\n")


class Layers(nn.Module):
    """A block that is called with side inputs, and notes what its process has counted when it begins."""

    def __init__(self, folder: str, depth: int) -> None:
        super().__init__()
        self.folder = folder
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, hidden: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        _note(self.folder)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden)) * mask[..., None] * table
        return hidden


class Masked(LightningModule):
    """Makes a mask of each batch, and always the same table, as those of rotary embeddings are."""

    def __init__(self, folder: str, depth: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))
        self.blocks = nn.ModuleList(Layers(folder, depth) for _ in range(DEPTH))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        hidden, mask = self.embed(batch), (batch[..., 0] > 0).float()
        table = torch.linspace(0, 1, LENGTH * WIDTH, device=self.device).view(LENGTH, WIDTH).cos()
        for block in self.blocks:
            hidden = block(hidden, mask, table)
        return hidden.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Noting(Callback):
    """Notes what the driver has counted when a batch begins."""

    def __init__(self) -> None:
        self.seen: list[Counts] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        import sim_device

        self.seen.append(sim_device.counts(0))


def _counted(folder: Path, depth: int) -> Counted:
    """Train with so many layers in a block; return what each step has counted, once all is known and warm."""
    noting, generator = Noting(), torch.Generator().manual_seed(0)
    batches = [torch.randn(ROWS, LENGTH, 4, generator=generator) for _ in range(STEPS)]
    options: dict[str, Any] = {"callbacks": [noting], "max_steps": STEPS, "gradient_clip_val": 0.5}
    data = DataLoader(batches, batch_size=None)
    train(lambda: Masked(str(folder), depth), data, 3, {"num_microbatches": MICROBATCHES}, **options)
    workers, calls = [], MICROBATCHES * DEPTH // 2
    for file in folder.iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        if file.name != str(os.getpid()):
            workers.append(lines[-STEPS * calls :: calls])  # before, the blocks were tried out
    return _per_step(noting.seen), [_per_step(starts) for starts in workers]


def _per_step(starts: Sequence[Counts]) -> list[Counts]:
    pairs = zip(starts[WARM:], starts[WARM - 1 :], strict=False)
    return [{name: later[name] - now[name] for name in now} for later, now in pairs]


def test_only_what_must_is_copied(tmp_path: Path) -> None:
    driver, workers = _counted(tmp_path, 2)
    assert len(workers) == 2
    for step in driver:
        assert 2 * HIDDEN + MASK <= step["to_host"] <= 1.05 * (2 * HIDDEN + MASK)
        assert 2 * HIDDEN <= step["to_device"] - BATCH <= 1.05 * 2 * HIDDEN
    for step in (step for worker in workers for step in worker):
        assert 2 * HIDDEN <= step["to_host"] <= 1.05 * 2 * HIDDEN
        assert 2 * HIDDEN <= step["to_device"] <= 1.05 * (2 * HIDDEN + MASK)  # the next mask may be here already
        assert step["between"] == 0


def test_a_device_is_waited_for_as_often_whatever_it_holds(tmp_path: Path) -> None:
    for few, many in zip(_syncs(tmp_path / "few", 2), _syncs(tmp_path / "many", 20), strict=True):
        assert few - MICROBATCHES < many < few + MICROBATCHES  # as above; there are 72 parameters more
        assert few <= 6 * MICROBATCHES


def _syncs(folder: Path, depth: int) -> list[float]:
    """Return how often each process waits in a step."""
    folder.mkdir()
    driver, workers = _counted(folder, depth)
    return [statistics.mean(step["syncs"] for step in steps) for steps in (driver, *workers)]


def test_sums_over_ranks_wait_as_often_whatever_they_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _syncs_of_sum(4) == _syncs_of_sum(40) == 2
    monkeypatch.setattr(gradients, "_BUCKET_BYTES", 2 * WIDTH * WIDTH * 4)
    assert _syncs_of_sum(4) == 4


def _syncs_of_sum(num_parameters: int) -> int:
    """Sum gradients with those of a rank that has the same."""
    import sim_device

    parameters = [
        nn.Parameter(torch.full((WIDTH, WIDTH), index + 1.0, device="sim:5")) for index in range(num_parameters)
    ]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    before = sim_device.counts(5)["syncs"]
    gradients.sum_over_holders(parameters, lambda tensor: tensor.mul_(2))
    waits = sim_device.counts(5)["syncs"] - before
    for parameter in parameters:
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 2 * parameter.detach())
    return waits
