"""LightningCLI: a configuration file sets the strategy, its dataclasses and the callbacks, every argument of them."""

import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from skippipe_plugin.callbacks import ExpertConfig, LoadBalancer, PipelineMonitor, StageRecovery
from skippipe_plugin.moe import MoEConfig
from skippipe_plugin.strategies import NetworkConfig, PathConfig, SkipPipeStrategy

EXAMPLES = Path(__file__).parents[2] / "examples"
NETWORK = {
    "host": "10.0.0.1",
    "port": 29_501,
    "secret_file": "job.secret",
    "workers": "local",
    "local_workers": 2,
    "join_timeout_s": 600.0,
    "backend": "gloo-pairs",
    "workers_per_device": 2,
}
PATHS = {
    "max_jump": 3,
    "max_swaps": 1,
    "max_back": 2,
    "eval_skip_ratio": 0.5,
    "costs": "uniform",
    "seed": 7,
}
MOE = {
    "router": "sigmoid",
    "expert_parallel": 2,
    "overlap": "auto",
    "top_k": 2,
    "capacity_factor": 1.5,
    "rectify": "both",
    "quantiles": True,
    "freeze_after": 100,
    "experts": "auto",
    "auxiliary_loss": 0.01,
    "causal": False,
    "exact_bias": True,
}
EXPERTS = {"rule": "proportional", "rate": 0.02, "auxiliary_loss": 0.005, "payback_steps": 50}
STRATEGY = {
    "skip_ratio": {0: 0.25, 600: 0.0},
    "schedule": "gpipe",
    "num_microbatches": 6,
    "microbatches": "stack",
    "replicas": 2,
    "drivers": 1,
    "blocks": "model.layers",
    "driver_stage": False,
    "gradient_scale": "visit",
    "paths": PATHS,
    "network": NETWORK,
    "moe": MOE,
    "verbose": False,
    "verify": "first",
    "microbatch_weight": "samples",
    "gather": "never",
}
MONITOR = {"every_n_steps": 20, "folder": "pictures", "picture": False, "trace": True}
RECOVERY = {
    "spares": 2,
    "rule": "squared",
    "lr_factor": 1.2,
    "while_missing": "skip",
    "swap_ends": True,
    "heartbeat_s": 5.0,
    "elastic": True,
}
BALANCER = {
    "stages": False,
    "every_n_steps": 30,
    "min_gain": 0.1,
    "min_steps": 40,
    "window": 3,
    "memory": 4,
    "experts": ["bias", "loss"],
    "expert_config": EXPERTS,
}
SETTINGS: dict[type, dict[str, Any]] = {
    SkipPipeStrategy: STRATEGY,
    PathConfig: PATHS,
    NetworkConfig: NETWORK,
    MoEConfig: MOE,
    PipelineMonitor: MONITOR,
    StageRecovery: RECOVERY,
    LoadBalancer: BALANCER,
    ExpertConfig: EXPERTS,
}


def entry(cls: type) -> dict[str, Any]:
    return {"class_path": f"{cls.__module__.rpartition('.')[0]}.{cls.__name__}", "init_args": SETTINGS[cls]}


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_the_file_below_sets_every_argument_to_another_value(cls: type) -> None:
    arguments = inspect.signature(cls).parameters
    assert SETTINGS[cls].keys() == arguments.keys(), (
        "a new argument belongs into this file, to show that YAML can set it"
    )
    same = {name for name, parameter in arguments.items() if parameter.default == SETTINGS[cls][name]}
    assert same <= {"drivers", "driver_stage", "experts"}, "these have one value that goes with the others"


def test_every_argument_can_be_set_from_a_file(tmp_path: Path) -> None:
    callbacks = [entry(cls) for cls in (PipelineMonitor, StageRecovery, LoadBalancer)]
    config = {"trainer": {"accelerator": "cpu", "devices": 5, "strategy": entry(SkipPipeStrategy)}}
    config["trainer"]["callbacks"] = callbacks
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = LightningCLI(BoringModel, run=False, args=["--config", str(file)], save_config_callback=None)
    strategy = cli.trainer.strategy
    assert isinstance(strategy, SkipPipeStrategy)
    configs = {"paths": PathConfig(**PATHS), "network": NetworkConfig(**NETWORK), "moe": MoEConfig(**MOE)}
    found = {name: getattr(strategy.settings, name) for name in STRATEGY.keys() - {"verify", "gather"}}
    assert found | {"verify": strategy.verify, "gather": strategy._gather} == STRATEGY | configs
    by_class = {type(callback): callback for callback in cli.trainer.callbacks}
    monitor, balancer = by_class[PipelineMonitor], by_class[LoadBalancer]
    assert (monitor.every_n_steps, monitor.folder, monitor.picture) == (20, Path("pictures"), False)
    assert by_class[StageRecovery].policy.while_missing == "skip"
    assert balancer.experts.methods == ("bias", "loss")
    assert balancer.experts.config == ExpertConfig(**EXPERTS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.strategy.skip_ratio=1.5", "out of range"),
        ("--trainer.strategy.gradient_scale=sum", "gradient_scale"),
        ("--trainer.strategy.paths.max_jump=0", "max_jump"),
        ("--trainer.strategy.stages=3", "stages"),
    ],
)
def test_what_a_file_gets_wrong_is_named(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = f"--trainer.strategy={entry(SkipPipeStrategy)['class_path']}"
    arguments = ["--trainer.accelerator=cpu", "--trainer.devices=3", strategy]
    with pytest.raises((SystemExit, ValueError)) as caught:
        LightningCLI(LightningModule, run=False, args=[*arguments, argument], save_config_callback=None)
    assert message in capsys.readouterr().err + str(caught.value)


@pytest.mark.slow
def test_the_example_runs_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model.num_layers": 3, "model.width": 32, "data.batch_size": 8, "data.path": "text.txt"}
    short = {"trainer.max_steps": 4, "trainer.val_check_interval": 4, "trainer.limit_val_batches": 1}
    short |= {"trainer.default_root_dir": str(tmp_path)}
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    arguments = [f"--{name}={value}" for name, value in (small | short).items()]
    monkeypatch.setattr("sys.argv", ["cli.py", "fit", "--config", str(EXAMPLES / "cli.yaml"), *arguments])
    runpy.run_path(str(EXAMPLES / "cli.py"), run_name="__main__")
    assert list(tmp_path.rglob("*.ckpt"))
    assert "SkipPipeStrategy" in next(tmp_path.rglob("config.yaml")).read_text()
