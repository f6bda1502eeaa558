"""Checkpoints are Lightning's own: any number of stages, or none, writes and resumes them."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.grids import all_slow_but, slow

from .models import tokens
from .modules import BATCH, Configured, loader
from .support import Run, assert_same_losses, assert_same_weights, train, trainer_for

EPOCH = 5
CASES = {
    "cosine": {"optimizer": "cosine"},
    "sgd": {"optimizer": "sgd"},
    "adagrad": {"optimizer": "adagrad"},
    "tied": {"optimizer": "amsgrad", "tied": True},
}


def _train(case: str, devices: int, **options: Any) -> Run:
    strategy = {"num_microbatches": 4, **options.pop("strategy", {})} if devices > 1 else None
    data = loader(tokens(BATCH * EPOCH))
    return train(lambda: Configured(**CASES[case]), data, devices, strategy, gradient_clip_val=0.5, **options)


@functools.cache
def _uninterrupted(case: str) -> Run:
    return _train(case, 1)


def _every_epoch(folder: Path) -> dict[str, Any]:
    # Of Lightning's ways to save once an epoch only this one resumes at the next batch, in one process too.
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=EPOCH, save_last=True)
    return {"callbacks": [checkpoint], "enable_checkpointing": True}


def _save(case: str, devices: int, folder: Path, **options: Any) -> str:
    """Train for one epoch and return the checkpoint."""
    _train(case, devices, max_steps=EPOCH, **_every_epoch(folder), **options)
    return str(folder / "last.ckpt")


RESUMED = [(3, 1), (1, 3), (3, 2), (2, 4)]


@pytest.mark.parametrize(("saved", "resumed"), all_slow_but(RESUMED, (3, 1), (2, 4)))
def test_another_number_of_stages_continues_the_run(saved: int, resumed: int, tmp_path: Path) -> None:
    _assert_continues("cosine", saved, resumed, tmp_path)


@pytest.mark.parametrize(("saved", "resumed"), [slow(3, 1), (1, 3)])
@pytest.mark.parametrize("case", ["sgd", "adagrad", "tied"])
def test_every_optimizer_continues(case: str, saved: int, resumed: int, tmp_path: Path) -> None:
    _assert_continues(case, saved, resumed, tmp_path)


@pytest.mark.parametrize("strategy", [{"replicas": 2}, slow({"driver_stage": True})], ids=["replicas", "driver_stage"])
def test_layouts_continue(strategy: dict[str, Any], tmp_path: Path) -> None:
    path = _save("cosine", 3, tmp_path, strategy=strategy)
    _compare(_train("cosine", 2, ckpt_path=path), _uninterrupted("cosine"))
    _compare(_train("cosine", 3, ckpt_path=path, strategy=strategy), _uninterrupted("cosine"))


def _assert_continues(case: str, saved: int, resumed: int, folder: Path) -> None:
    _compare(_train(case, resumed, ckpt_path=_save(case, saved, folder)), _uninterrupted(case))


def _compare(resumed: Run, whole: Run) -> None:
    assert_same_losses(resumed.losses, whole.losses[EPOCH:])
    assert_same_weights(resumed.weights, whole.weights)


def test_the_file_is_the_plain_trainers(tmp_path: Path) -> None:
    pipeline = torch.load(_save("cosine", 3, tmp_path / "pipeline"), "cpu", weights_only=False)  # see docs/contract.md
    plain = torch.load(_save("cosine", 1, tmp_path / "plain"), "cpu", weights_only=False)
    _assert_same_states(pipeline, plain)


def _assert_same_states(pipeline: dict[str, Any], plain: dict[str, Any]) -> None:
    assert _form(pipeline) == _form(plain)
    assert_same_weights(pipeline["state_dict"], plain["state_dict"])
    (found,), (expected,) = pipeline["optimizer_states"], plain["optimizer_states"]
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=1e-3, atol=1e-6)


def _form(value: Any) -> Any:
    """Describe a checkpoint: its keys in order, and types and shapes of its values."""
    if isinstance(value, Tensor):
        return type(value), tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, dict):
        return [
            (key if "ModelCheckpoint" not in str(key) else "checkpoint", _form(item)) for key, item in value.items()
        ]
    if isinstance(value, (list, tuple)):
        return type(value), [_form(item) for item in value]
    return type(value)


LOAD_WITHOUT_THE_PLUGIN = """
import sys
sys.modules["skippipe_plugin"] = None
import torch
from tests.e2e.modules import Configured
module = Configured.load_from_checkpoint(sys.argv[1])
assert not any(parameter.is_meta for parameter in module.parameters())
torch.save(module.state_dict(), sys.argv[2])
"""


def test_loading_needs_no_plugin(tmp_path: Path) -> None:
    path = _save("cosine", 3, tmp_path)
    loaded = tmp_path / "loaded.pt"
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", LOAD_WITHOUT_THE_PLUGIN, path, loaded], check=True, cwd=root, timeout=120)
    assert_same_weights(torch.load(loaded), torch.load(path, weights_only=False)["state_dict"], rtol=0, atol=0)


def test_saving_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, save_weights_only=True)
    run = _train("cosine", 3, callbacks=[checkpoint], enable_checkpointing=True)
    assert len(list(tmp_path.iterdir())) == 5
    assert_same_losses(run.losses, _uninterrupted("cosine").losses)


def test_saving_after_the_run(tmp_path: Path) -> None:
    """The optimizer's state comes back with the weights."""
    paths = {devices: tmp_path / f"{devices}.ckpt" for devices in (1, 3)}
    for devices, path in paths.items():
        _train("cosine", devices, max_epochs=1, max_steps=-1).trainer.save_checkpoint(path)
    pipeline, plain = (torch.load(paths[devices], weights_only=False) for devices in (3, 1))
    _assert_same_states(pipeline, plain)
    resumed = [_train("cosine", 1, ckpt_path=str(path)) for path in paths.values()]
    assert_same_losses(resumed[1].losses, resumed[0].losses)


def test_dropout_continues_with_the_same_randomness(tmp_path: Path) -> None:
    data = loader(tokens(BATCH * EPOCH))

    def run(devices: int, **options: Any) -> list[float]:
        return train(lambda: Configured(dropout=0.3), data, devices, {"num_microbatches": 4}, **options).losses

    run(3, max_steps=EPOCH, **_every_epoch(tmp_path))
    assert_same_losses(run(2, ckpt_path=str(tmp_path / "last.ckpt")), run(3)[EPOCH:])


def test_evaluation_of_a_checkpoint(tmp_path: Path) -> None:
    path = _save("cosine", 3, tmp_path)
    data = loader(tokens(BATCH * 2, seed=1))
    results = [trainer_for(devices).test(Configured(), data, ckpt_path=path, verbose=False) for devices in (1, 3)]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
