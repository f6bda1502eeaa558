"""The monitor measures the steps it should, logs and writes what it says, and changes no loss."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.callbacks import PipelineMonitor
from skippipe_plugin.schedule import full_schedule, simulate
from skippipe_plugin.schedule.cost import CostModel

from .support import Run, train, trainer_for

PNG = b"\x89PNG\r\n\x1a\n"
METRICS = {"pipeline/utilisation", "pipeline/bubble", "pipeline/makespan_s"}


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.enter(batch[0])
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Recorded(Callback):
    """Notes after each batch whether a new timeline is there."""

    def __init__(self) -> None:
        self.makespans: list[float | None] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        timeline = trainer.strategy.timeline  # type: ignore[attr-defined]
        self.makespans.append(timeline and timeline.makespan_s)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(36, 4, generator=torch.Generator().manual_seed(0))), batch_size=6)


def fit(*callbacks: Callback, **options: Any) -> Run:
    return train(Model, data(), 3, {"num_microbatches": 3}, callbacks=callbacks, max_steps=6, **options)


def test_a_monitored_fit_is_drawn_logged_and_otherwise_the_same(tmp_path: Path) -> None:
    recorded = Recorded()
    logger = CSVLogger(tmp_path, name="run", version=0)
    monitor = PipelineMonitor(every_n_steps=2, trace=True)
    watched = fit(monitor, recorded, logger=logger, log_every_n_steps=4)
    plain = fit()
    assert watched.losses == plain.losses
    assert watched.trainer.strategy.record_timeline is False  # type: ignore[attr-defined]
    assert recorded.makespans[0] is None
    assert len(set(recorded.makespans)) == 4  # none, and one for each of the steps 2, 4, 6

    folder = Path(logger.log_dir)
    assert sorted(path.name for path in folder.glob("pipeline-*")) == [
        f"pipeline-step00000{step}.{suffix}" for step in (2, 4, 6) for suffix in ("png", "trace.json")
    ]
    assert all(path.read_bytes().startswith(PNG) for path in folder.glob("*.png"))
    trace = json.loads((folder / "pipeline-step000002.trace.json").read_text())["traceEvents"]
    assert len([event for event in trace if event["ph"] == "X"]) == 3 * 3 + 2 * 3 * 2
    assert len([event for event in trace if event["ph"] == "s"]) == len([e for e in trace if e["ph"] == "f"]) == 3 * 6

    assert watched.trainer.callback_metrics.keys() >= METRICS
    shares = [float(watched.trainer.callback_metrics[f"pipeline/{name}"]) for name in ("utilisation", "bubble")]
    assert 0 < shares[0] < 1
    assert sum(shares) == pytest.approx(1)
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["pipeline/makespan_s"]]
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert float(rows[-1]["pipeline/makespan_s"]) == pytest.approx(recorded.makespans[-1])


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    recorded = Recorded()
    monitor = PipelineMonitor(every_n_steps=1, folder=tmp_path / "new", picture=False, trace=True)
    train(
        Model, data(), 2, {"num_microbatches": 2}, callbacks=[monitor, recorded], max_steps=2, accumulate_grad_batches=2
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "pipeline-step000001.trace.json",
        "pipeline-step000002.trace.json",
    ]
    first, second, third, fourth = recorded.makespans
    assert first == second != third == fourth


def test_a_run_too_short_to_sample_says_so() -> None:
    with pytest.warns(UserWarning, match="samples every 50 steps, the run ended after step 2"):
        train(Model, data(), 2, {"num_microbatches": 2}, callbacks=[PipelineMonitor()], max_steps=2)


def test_another_strategy_is_an_error_before_work() -> None:
    trainer = trainer_for(1, callbacks=[PipelineMonitor()], max_steps=1)
    with pytest.raises(TypeError, match=r"runs SingleDeviceStrategy: use Trainer\(strategy=SkipPipeStrategy"):
        trainer.fit(Model(), data())


def test_a_short_batch_is_not_compared() -> None:
    from skippipe_plugin.callbacks.monitor import predict
    from skippipe_plugin.schedule.timeline import utilisation

    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=4)
    whole = simulate(schedule, CostModel.uniform(2, 3))
    predicted = predict(whole, schedule)
    assert predicted is not None
    assert predicted.makespan_s == pytest.approx(whole.makespan_s)
    short = simulate(full_schedule("1f1b", num_stages=2, num_microbatches=3), CostModel.uniform(2, 3))
    assert predict(short, schedule) is None
    assert utilisation(whole, schedule) == pytest.approx(0.8)
