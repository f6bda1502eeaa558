"""The strategy is found by name after an import, and LightningCLI sets all of it from a file."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

import skippipe_plugin  # noqa: F401 - registers the name
from skippipe_plugin.strategies import SkipPipeStrategy

CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 5,
        "strategy": {
            "class_path": "skippipe_plugin.strategies.SkipPipeStrategy",
            "init_args": {
                "schedule": "gpipe",
                "num_microbatches": 6,
                "replicas": 2,
                "blocks": "model.layers",
                "gradient_scale": "visit",
                "network": {"host": "127.0.0.1", "port": 29777},
            },
        },
    }
}


def test_by_name() -> None:
    trainer = Trainer(accelerator="cpu", devices=3, strategy="skippipe", logger=False)
    assert isinstance(trainer.strategy, SkipPipeStrategy)
    assert trainer.strategy.num_stages == 2


@pytest.mark.parametrize("order", ["skippipe_plugin, lightning.pytorch", "lightning.pytorch, skippipe_plugin"])
def test_the_name_is_there_whichever_is_imported_first(order: str) -> None:
    code = f"import {order}\nfrom lightning.pytorch.strategies import StrategyRegistry as R\nassert 'skippipe' in R"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, cwd=Path(__file__).parents[2])


def test_importing_the_planner_needs_neither_torch_nor_lightning() -> None:
    code = "import sys, skippipe_plugin.schedule\nassert not {'torch', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, cwd=Path(__file__).parents[2])


def test_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    cli = LightningCLI(LightningModule, run=False, args=["--config", str(config)], save_config_callback=None)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, SkipPipeStrategy)
    settings = strategy.settings
    assert (strategy.num_stages, settings.blocks, settings.gradient_scale) == (2, "model.layers", "visit")
    assert settings.network.port == 29777


def test_a_mistake_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG).replace("gpipe", "2f2b"))
    with pytest.raises(SystemExit):
        LightningCLI(LightningModule, run=False, args=["--config", str(config)], save_config_callback=None)
    assert "2f2b" in capsys.readouterr().err
