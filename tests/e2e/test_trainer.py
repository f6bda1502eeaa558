"""What the Trainer does around the steps is what it does in one process."""

import csv
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MaxMetric, MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import NetworkConfig
from tests.grids import all_slow_but

from .models import Transformer, next_token_loss, tokens
from .modules import BATCH, LanguageModel, cosine, loader
from .support import Run, assert_same_run, assert_same_weights, train, trainer_for

PIPELINE: dict[str, Any] = {"num_microbatches": 4}


class Observed(LanguageModel):
    """Logs in every way that Lightning has."""

    def __init__(self, **options: Any) -> None:
        super().__init__(Transformer(), options.pop("optimizer", cosine), **options)
        self.train_accuracy = MulticlassAccuracy(32, average="micro")
        self.val_accuracy = MulticlassAccuracy(32, average="micro")
        self.largest = MaxMetric()
        self.mean = MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.model(batch)
        loss = next_token_loss(logits, batch)
        self.train_accuracy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train/step", float(batch_idx), on_step=True, on_epoch=False)
        self.log("train/samples", float(len(batch)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("train/largest", logits.detach().amax(), on_step=False, on_epoch=True, reduce_fx="max")
        self.log("train/smallest", logits.detach().amin(), on_step=False, on_epoch=True, reduce_fx=torch.min)
        self.log("train/sized", loss, on_step=False, on_epoch=True, batch_size=len(batch))
        self.log_dict({"train/a": loss * 2, "train/b": logits.detach().mean()}, on_step=True, on_epoch=False)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        logits = self.model(batch)
        loss = next_token_loss(logits, batch)
        self.val_accuracy.update(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.mean.update(loss, weight=len(batch))
        self.largest.update(logits)
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/accuracy", self.val_accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val/mean", self.mean.compute())
        self.log("val/largest", self.largest.compute())
        self.mean.reset()
        self.largest.reset()


def both(make: Callable[[], LightningModule], data: Any = None, **options: Any) -> tuple[Run, Run]:
    """Train as a pipeline and in one process; callbacks and loggers are given as functions that make them."""
    data = data if data is not None else loader(tokens(BATCH * 5))
    made = options.pop("made", lambda _: {})
    return (
        train(make, data, 3, PIPELINE, **options, **made("pipeline")),
        train(make, data, 1, **options, **made("plain")),
    )


def assert_same_metrics(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6, nan_ok=True), name


# ------------------------------------------------------------------ logging


def _rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    return list(csv.DictReader(path.read_text().splitlines()))


def test_loggers_get_the_same_rows(tmp_path: Path) -> None:
    def made(name: str) -> dict[str, Any]:
        logger = CSVLogger(tmp_path / name)
        return {"logger": logger, "callbacks": [LearningRateMonitor("step")]}

    validation = loader(tokens(20, seed=1))
    both(Observed, loader(tokens(44)), made=made, val_data=validation, max_epochs=2, max_steps=-1, log_every_n_steps=1)
    found, expected = _rows(tmp_path / "pipeline"), _rows(tmp_path / "plain")
    assert len(found) == len(expected) > 10
    assert len(expected[0]) > 15
    for ours, theirs in zip(found, expected, strict=True):
        assert {name for name, text in ours.items() if text} == {name for name, text in theirs.items() if text}
        assert_same_metrics(*({k: torch.tensor(float(v)) for k, v in row.items() if v} for row in (ours, theirs)))


def test_callback_and_logged_metrics() -> None:
    pipeline, plain = both(Observed, val_data=loader(tokens(20, seed=1)), log_every_n_steps=1)
    assert_same_metrics(pipeline.trainer.callback_metrics, plain.trainer.callback_metrics)
    assert_same_metrics(pipeline.trainer.logged_metrics, plain.trainer.logged_metrics)
    assert_same_metrics(pipeline.trainer.progress_bar_metrics, plain.trainer.progress_bar_metrics)


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars(bar: type[Callback], capsys: pytest.CaptureFixture[str]) -> None:
    def made(_: str) -> dict[str, Any]:
        return {"callbacks": [bar()], "enable_progress_bar": True, "enable_model_summary": True}

    pipeline, plain = both(Observed, made=made, val_data=loader(tokens(20, seed=1)), max_steps=5)
    assert_same_metrics(pipeline.trainer.progress_bar_metrics, plain.trainer.progress_bar_metrics)
    assert "val/loss" in capsys.readouterr().out


class Outputs(Callback):
    """Keeps what callbacks are given."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.logits.append(outputs["logits"])


def test_outputs_of_a_step_are_those_of_the_whole_batch() -> None:
    kept: dict[str, Outputs] = {}

    def made(name: str) -> dict[str, Any]:
        kept[name] = Outputs()
        return {"callbacks": [kept[name]]}

    both(Observed, made=made, max_steps=3)
    for ours, theirs in zip(kept["pipeline"].logits, kept["plain"].logits, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------- callbacks


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    def made(name: str) -> dict[str, Any]:
        stopping = EarlyStopping("val/loss", patience=1, min_delta=0.05)
        best = ModelCheckpoint(tmp_path / name, monitor="val/accuracy", mode="max", save_top_k=2, filename="{epoch}")
        return {"callbacks": [stopping, best], "enable_checkpointing": True}

    pipeline, plain = both(Observed, made=made, val_data=loader(tokens(20, seed=1)), max_steps=-1, max_epochs=15)
    assert pipeline.trainer.current_epoch == plain.trainer.current_epoch < 15
    found, expected = pipeline.trainer.checkpoint_callback, plain.trainer.checkpoint_callback
    assert isinstance(found, ModelCheckpoint)
    assert isinstance(expected, ModelCheckpoint)
    assert Path(found.best_model_path).name == Path(expected.best_model_path).name
    assert float(found.best_model_score) == pytest.approx(float(expected.best_model_score))
    assert sorted(p.name for p in (tmp_path / "pipeline").iterdir()) == sorted(
        p.name for p in (tmp_path / "plain").iterdir()
    )


def test_a_plateau_lowers_the_learning_rate_of_the_workers() -> None:
    def plateau(module: torch.nn.Module) -> dict[str, Any]:
        optimizer = SGD(module.parameters(), lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    pipeline, plain = both(
        lambda: Observed(optimizer=plateau), val_data=loader(tokens(20, seed=1)), max_steps=-1, max_epochs=3
    )
    assert plain.trainer.optimizers[0].param_groups[0]["lr"] < 0.1
    assert_same_run(pipeline, plain)


def test_a_scheduler_per_epoch() -> None:
    def steps(module: torch.nn.Module) -> Any:
        optimizer = SGD(module.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.1)]

    assert_same_run(*both(lambda: Observed(optimizer=steps), max_steps=-1, max_epochs=3))


def test_a_schedule_of_gradient_accumulation() -> None:
    def made(_: str) -> dict[str, Any]:
        return {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})]}

    assert_same_run(*both(Observed, made=made, max_steps=-1, max_epochs=3))


def test_the_summary_counts_every_parameter() -> None:
    class Summary(Callback):
        def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
            summary = ModelSummary(module, max_depth=3)
            counts.append((summary.total_parameters, summary.trainable_parameters, str(summary)))

    def make() -> LanguageModel:
        module = LanguageModel(Transformer())
        module.model.blocks[1].requires_grad_(False)
        return module

    counts: list[tuple[int, int, str]] = []
    both(make, callbacks=[Summary()], max_steps=1)
    assert counts[0] == counts[1]


# -------------------------------------------------------------------- loops


class Trace(Callback):
    """Records which hooks run, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.calls.append(("train", trainer.current_epoch, batch_idx, trainer.global_step, len(batch)))

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.calls.append(("validate", trainer.global_step, batch_idx, dataloader_idx, len(batch)))

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.calls.append(("step",))

    def on_before_zero_grad(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.calls.append(("zero",))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.calls.append(("epoch end", trainer.current_epoch))

    def on_sanity_check_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.calls.append(("sanity",))


class Endless(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from tokens(BATCH * 3 + 2)


class Data(LightningDataModule):
    """Loaders from a data module, two for validation."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(tokens(BATCH * 5), shuffle=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [loader(tokens(10, seed=1)), loader(tokens(6, seed=2), 3)]


LOOPS: dict[str, dict[str, Any]] = {
    "sanity": {"num_sanity_val_steps": -1, "max_epochs": 1},
    "val_check_interval": {"val_check_interval": 2, "max_epochs": 2},
    "val_check_fraction": {"val_check_interval": 0.5, "max_epochs": 2},
    "val_check_steps": {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2},
    "limits": {"limit_train_batches": 3, "limit_val_batches": 0.5, "max_epochs": 2},
    "overfit": {"overfit_batches": 2, "max_epochs": 3},
    "fast_dev_run": {"fast_dev_run": 2},
    "min_steps": {"max_steps": 7, "max_epochs": -1},
    "accumulate": {"accumulate_grad_batches": 2, "max_epochs": 2},
}


def _trace(make: Callable[[], LightningModule], data: Any, **options: Any) -> None:
    traces: list[Trace] = []

    def made(_: str) -> dict[str, Any]:
        traces.append(Trace())
        return {"callbacks": [traces[-1]]}

    assert_same_run(*both(make, data, made=made, **{"max_steps": -1, **options}))
    assert traces[0].calls == traces[1].calls
    assert len(traces[0].calls) > 2


@pytest.mark.parametrize("name", all_slow_but(LOOPS, "val_check_interval", "limits", "min_steps", "accumulate"))
def test_loops(name: str) -> None:
    _trace(Observed, loader(tokens(BATCH * 5)), val_data=loader(tokens(20, seed=1)), **LOOPS[name])


def test_data_without_a_length() -> None:
    _trace(Observed, DataLoader(Endless(), batch_size=BATCH), max_epochs=2)


def test_a_data_module_with_two_validation_loaders() -> None:
    _trace(Observed, Data(), max_epochs=2)


def test_max_time_ends_the_run() -> None:
    timer = Timer(timedelta(seconds=2))
    run = train(Observed, loader(tokens(BATCH * 5)), 3, PIPELINE, max_steps=-1, callbacks=[timer])
    assert run.losses
    assert run.trainer.should_stop


# ------------------------------------------- validate, test, predict, again


class Logits(LanguageModel):
    """Predicts several things at once."""

    def predict_step(self, batch: Tensor) -> dict[str, Any]:  # type: ignore[override]
        logits = self.model(batch)
        return {"logits": logits, "best": logits.argmax(-1), "text": [str(row.tolist()) for row in batch], "scale": 2.0}


def test_validate_test_and_predict() -> None:
    data = loader(tokens(20, seed=1))
    results = []
    for devices in (3, 1):
        torch.manual_seed(0)
        module = Logits(Transformer())
        trainer = trainer_for(devices, PIPELINE if devices > 1 else None)
        results.append(
            (
                trainer.validate(module, data, verbose=False),
                trainer.test(module, data, verbose=False),
                trainer.predict(module, data),
            )
        )
    (validated, tested, predicted), expected = results
    assert validated[0] == pytest.approx(expected[0][0], rel=1e-5)
    assert tested[0] == pytest.approx(expected[1][0], rel=1e-5)
    assert [batch.pop("text") for batch in predicted] == [batch.pop("text") for batch in expected[2]]
    torch.testing.assert_close(predicted, expected[2])


def test_predict_without_a_step_of_ones_own() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Transformer()

        def forward(self, batch: Tensor) -> Tensor:
            return self.model(batch)

    torch.manual_seed(0)
    module, data = Plain(), loader(tokens(20))
    pipeline, plain = (trainer_for(devices).predict(module, data) for devices in (3, 1))
    torch.testing.assert_close(pipeline, plain)


def test_the_model_is_ordinary_after_every_call() -> None:
    run = train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH * 5)), 3, PIPELINE, max_steps=3)
    module = run.module
    assert isinstance(module, LanguageModel)
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert type(module.model.blocks[0]).__mro__ == type(Transformer().blocks[0]).__mro__
    assert module.model(tokens(2)).shape == (2, 8, 32)
    loss = module.loss(tokens(4))
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_fit_again_and_evaluate_with_the_same_trainer() -> None:
    results = []
    for devices in (3, 1):
        run = train(
            lambda: LanguageModel(Transformer()),
            loader(tokens(BATCH * 5)),
            devices,
            PIPELINE if devices > 1 else None,
            max_epochs=1,
            max_steps=-1,
        )
        trainer, module = run.trainer, run.module
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, loader(tokens(BATCH * 5)))
        data = loader(tokens(20, seed=1))
        scores = (trainer.validate(module, data, verbose=False)[0], trainer.test(module, data, verbose=False)[0])
        results.append((trainer.global_step, scores, {k: v.clone() for k, v in module.state_dict().items()}))
    (steps, scores, weights), expected = results
    assert steps == expected[0] == 15
    for ours, theirs in zip(scores, expected[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert_same_weights(weights, expected[2])


def test_processes_that_share_a_device() -> None:
    """As on a machine with one accelerator; a CPU is shared in any case."""
    runs = []
    for settings in (None, {**PIPELINE, "network": NetworkConfig(workers_per_device=3)}):
        runs.append(train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH * 5)), 1, settings))
    one, shared = runs
    assert shared.trainer.strategy.num_processes == 3
    assert_same_run(shared, one)


def test_the_next_trainer_takes_the_workers_over() -> None:
    def run() -> set[int]:
        make, data = (lambda: LanguageModel(Transformer())), loader(tokens(BATCH))
        assert len(train(make, data, 3, PIPELINE, max_steps=2).losses) == 2
        return {child.pid for child in psutil.Process().children() if "skippipe_plugin.worker" in child.cmdline()}

    workers = run()
    assert len(workers) >= 2
    assert run() == run() == workers


class Sensitive(LanguageModel):
    """Asks for gradients while it is evaluated."""

    def validation_step(self, batch: Tensor) -> None:
        with torch.enable_grad():
            torch.autograd.grad(self.loss(batch), self.model.embedding.weight)


def test_gradients_in_validation_are_refused() -> None:
    with pytest.raises(SkipPipeError, match="no way back"):
        trainer_for(3, PIPELINE, inference_mode=False).validate(Sensitive(Transformer()), loader(tokens(8)))


def test_validation_without_inference_mode() -> None:
    results = []
    for devices in (3, 1):
        torch.manual_seed(0)
        trainer = trainer_for(devices, PIPELINE if devices > 1 else None, inference_mode=False)
        results.append(trainer.validate(LanguageModel(Transformer()), loader(tokens(20)), verbose=False)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"profiler": "simple"}, {"detect_anomaly": True}, {"enable_model_summary": True}], ids=str
)
def test_aids_to_debugging(options: dict[str, Any]) -> None:
    class WithExample(LanguageModel):
        """The summary runs it on its example, outside of any step."""

        def __init__(self) -> None:
            super().__init__(Transformer())
            self.example_input_array = tokens(2)

        def forward(self, batch: Tensor) -> Tensor:
            return self.model(batch)

    assert_same_run(*both(WithExample, max_steps=3, **options))


class Interrupted(LanguageModel):
    """The user presses Ctrl-C in the third step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # type: ignore[override]
        loss = super().training_step(batch)
        if batch_idx == 2:
            raise KeyboardInterrupt
        return loss


def test_an_interrupted_run_leaves_the_trained_weights() -> None:
    weights = []
    for devices in (3, 1):
        torch.manual_seed(0)
        module = Interrupted(Transformer())
        trainer = trainer_for(devices, PIPELINE if devices > 1 else None, max_steps=5)
        with pytest.raises(SystemExit):
            trainer.fit(module, loader(tokens(BATCH * 5)))
        assert trainer.interrupted
        weights.append(module.state_dict())
    assert_same_weights(weights[0], weights[1])
