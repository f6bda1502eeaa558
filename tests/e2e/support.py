"""Run a module with the plain Trainer and as a pipeline, and compare.

Every run starts from the same seed, so two runs of the same case have the same initial weights and the same batches.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from skippipe_plugin.strategies import SkipPipeStrategy

from .modules import STEPS

DEVICE = torch.device("sim", 0) if hasattr(torch, "sim") else torch.device("cpu")
"""What a loop of one process trains on; with ``pytest --device sim`` a simulated device."""


@dataclass
class Run:
    """What a training run leaves."""

    trainer: Trainer
    module: LightningModule
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


class Losses(Callback):
    """Notes the loss of every batch, NaN where there was none."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float("nan") if not outputs else float(outputs["loss"]))


def trainer_for(devices: int, strategy: Mapping[str, Any] | None = None, **options: Any) -> Trainer:
    """Build a quiet Trainer: a pipeline when it has more than one device or settings of the strategy."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plugin = {"strategy": SkipPipeStrategy(**(strategy or {}))} if devices > 1 or strategy else {}
    if hasattr(torch, "sim"):
        plugin, options = _on_sim(plugin, options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*GPU available.*")
        usual = {"accelerator": "cpu", **quiet, "enable_model_summary": False}
        return Trainer(devices=devices, **plugin, **{**usual, **options})


def _on_sim(plugin: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train on the devices of ``pytest --device sim``."""
    from tests.device import accelerator

    accelerator.register()
    alone = accelerator.one_process() if not plugin and "strategy" not in options else {}
    precise = accelerator.mixed(options.get("precision"))
    rest = {name: value for name, value in options.items() if name != "precision"}
    return {**alone, **plugin, **precise}, {"accelerator": "sim", **rest}


def train(
    make: Callable[[], LightningModule],
    data: Any,
    devices: int,
    strategy: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    ckpt_path: str | None = None,
    val_data: Any = None,
    **options: Any,
) -> Run:
    """Fit ``make()`` for ``STEPS`` steps (or what ``options`` say)."""
    seed_everything(seed, verbose=False)
    module = make()
    losses = Losses()
    callbacks = [losses, *options.pop("callbacks", ())]
    trainer = trainer_for(devices, strategy, **{"max_steps": STEPS, "callbacks": callbacks, **options})
    trainer.fit(module, data, val_data, ckpt_path=ckpt_path)
    weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return Run(trainer, module, losses.values, weights)


def assert_same_losses(found: Sequence[float], expected: Sequence[float], rtol: float = 1e-5) -> None:
    assert len(found) == len(expected)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=rtol, atol=0.0, equal_nan=True)


def assert_same_weights(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_run(
    found: Run, expected: Run, rtol: float = 1e-5, weights_rtol: float = 1e-4, weights_atol: float = 1e-5
) -> None:
    """Compare losses and weights, and that the loss changed: there was something to compare."""
    assert len(set(expected.losses)) > 1
    assert_same_losses(found.losses, expected.losses, rtol)
    assert_same_weights(found.weights, expected.weights, weights_rtol, weights_atol)
