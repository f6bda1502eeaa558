"""Where the blocks are between runs: ``SkipPipeStrategy(gather=...)``."""

import logging
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import gathering

from .support import trainer_for


class Module(LightningModule):
    """Four blocks and a head, which is evaluated, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 4)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if self.fails:
            raise ArithmeticError("by the user's step")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def batches() -> Any:
    draw = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 8, generator=draw), torch.arange(24) % 4)
    return torch.utils.data.DataLoader(data, batch_size=8)


def fitted(gather: str | None, devices: int = 3, **options: Any) -> tuple[Module, Trainer]:
    seed_everything(1, verbose=False)
    strategy = None if gather is None else {"num_microbatches": 2, "gather": gather, **options.pop("strategy", {})}
    trainer = trainer_for(1 if gather is None else devices, strategy, max_epochs=1, **options)
    module = Module()
    trainer.fit(module, batches())
    return module, trainer


def loss_of(trainer: Trainer, module: Module) -> float:
    return trainer.validate(module, batches(), verbose=False)[0]["loss"]


def all_of(gather: str | None, folder: Path) -> tuple[dict[str, Any], Module, Trainer]:
    """Do between two fits all that is done with a model, and after them."""
    module, trainer = fitted(gather)
    found: dict[str, Any] = {"loss": loss_of(trainer, module)}
    found["state"] = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        found["called"] = module(torch.ones(2, 8, device=module.device)).clone()
    found["predicted"] = torch.cat(trainer.predict(module, batches()))
    file = folder / f"{gather}.ckpt"
    trainer.save_checkpoint(file)
    with torch.no_grad():
        module.blocks[1][0].weight.mul_(0.5)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches())
    found["later"] = {name: value.clone() for name, value in module.state_dict().items()}
    found["loss later"] = loss_of(trainer, module)
    checkpoint = torch.load(file, weights_only=False)
    found["saved"], found["optimizer"] = checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]
    trainer.validate(module, batches(), verbose=False, ckpt_path=file)
    found["loaded"] = {name: value.clone() for name, value in module.state_dict().items()}
    return found, module, trainer


@pytest.mark.parametrize("gather", ["never", "always"])
def test_what_is_done_between_runs_is_that_of_one_process(gather: str, tmp_path: Path) -> None:
    expected, _, _ = all_of(None, tmp_path)
    found, module, trainer = all_of(gather, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, check_device=False)
    stays = gather == "never"
    assert bool(trainer.strategy.worker_pids) == stays
    trainer.strategy.gather()
    assert not trainer.strategy.worker_pids
    assert all(type(each) is nn.Parameter for each in module.parameters())
    now = {name: value.clone() for name, value in module.state_dict().items()}
    torch.testing.assert_close(now, expected["loaded"], rtol=1e-5, atol=1e-6, check_device=False)
    assert len(trainer.optimizers[0].state) == 10


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_auto_leaves_what_the_host_has_no_room_for(
    free: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gathering, "available_bytes", lambda: free)
    module, trainer = fitted("auto")
    assert bool(trainer.strategy.worker_pids) == (free == 0)
    told = [each.message for each in caplog.records if "stay on the workers" in each.message]
    assert len(told) == (free == 0)
    other = Module()
    if free:
        loss_of(trainer, other)
        return
    with pytest.raises(SkipPipeError, match=r"in the module.*trainer\.strategy\.gather\(\), where there is memory"):
        loss_of(trainer, other)
    loss = loss_of(trainer, module)
    monkeypatch.setattr(gathering, "available_bytes", lambda: 1 << 40)
    loss_of(trainer, other)  # that of before comes back by itself
    assert all(type(each) is nn.Parameter for each in module.parameters())
    assert loss_of(trainer, module) == pytest.approx(loss, abs=1e-6)


def test_blocks_that_stay_are_where_their_strategy_says() -> None:
    module, trainer = fitted("never")
    loss, old = loss_of(trainer, module), trainer.optimizers[0]
    assert loss_of(trainer_for(1), module) == pytest.approx(loss, abs=1e-6)  # through the workers
    with pytest.raises(SkipPipeError, match=r"blocks\.0\.0\.weight is on the workers of another pipeline.*gather\(\)"):
        loss_of(trainer_for(3, {"num_microbatches": 2}), module)
    with pytest.raises(SkipPipeError, match=r"called outside of a training step.*gather\(\) brings them"):
        trainer_for(1, max_epochs=1).fit(module, batches())
    with pytest.raises(SkipPipeError, match=r"differs from it in the module, .*gather\(\)$"):
        loss_of(trainer, Module())
    assert loss_of(trainer, module) == pytest.approx(loss, abs=1e-6)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, batches())
    with pytest.raises(SkipPipeError, match="the workers, which step that of a later fit now"):
        old.state_dict()
    trainer.strategy.gather()
    assert loss_of(trainer_for(3, {"num_microbatches": 2}), module) < loss


def test_what_has_rested_is_gathered_whatever_the_trainer_was_given_since() -> None:
    module, trainer = fitted("never")
    other = Module()
    own = vars(other).keys()
    with pytest.raises(SkipPipeError, match="differs from it in the module"):
        loss_of(trainer, other)
    trainer.strategy.gather()
    assert all(type(each) is nn.Parameter for each in module.parameters())
    assert "zero_grad" not in vars(module)
    assert "zero_grad" not in own


def test_a_compiled_module_stays() -> None:
    module, _ = fitted(None)
    expected = loss_of(trainer_for(1), module)
    seed_everything(1, verbose=False)
    module, trainer = Module(), trainer_for(3, {"num_microbatches": 2, "gather": "never"}, max_epochs=1)
    compiled = torch.compile(module, backend="eager")
    trainer.fit(compiled, batches())
    assert loss_of(trainer, compiled) == pytest.approx(expected, abs=1e-6)
    trainer.strategy.gather()
    assert loss_of(trainer, module) == pytest.approx(expected, abs=1e-6)


def test_blocks_come_back_after_a_failure() -> None:
    module, trainer = fitted("never")
    trainer.fit_loop.max_epochs, module.fails = 2, True
    with pytest.raises(ArithmeticError, match="by the user's step"):
        trainer.fit(module, batches())
    assert all(type(each) is nn.Parameter for each in module.parameters())
    assert not trainer.strategy.worker_pids


def test_a_run_cannot_be_gathered_under_way() -> None:
    class Gathers(Module):
        def on_train_start(self) -> None:
            self.trainer.strategy.gather()

    with pytest.raises(SkipPipeError, match=r"between runs, and one is under way"):
        trainer_for(3, {"num_microbatches": 2}, max_epochs=1).fit(Gathers(), batches())


def test_never_is_refused_where_nobody_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "supervised", lambda: True)
    with pytest.raises(SkipPipeError, match=r'gather="never" .* under skippipe run .*use gather="always"'):
        fitted("never")


@pytest.mark.slow
def test_a_worker_lost_between_runs_is_replaced_in_the_next(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    options = {"devices": 5, "strategy": {"replicas": 2}, "callbacks": [StageRecovery()]}
    module, trainer = fitted("never", **options)
    loss = loss_of(trainer, module)
    os.kill(trainer.strategy.worker_pids[2], 9)
    assert loss_of(trainer, module) == pytest.approx(loss, abs=1e-6)


@pytest.mark.slow
def test_a_worker_lost_between_runs_is_named_without_recovery() -> None:
    module, trainer = fitted("never")
    os.kill(trainer.strategy.worker_pids[1], 9)
    with pytest.raises(SkipPipeError, match=r"worker rank 1 .* is gone"):
        loss_of(trainer, module)


def test_workers_of_models_that_nobody_has_any_more_are_taken_over() -> None:
    module, trainer = fitted("never")
    num_workers = len(psutil.Process().children())
    for _ in range(3):
        del module, trainer
        module, trainer = fitted("never")
    assert len(psutil.Process().children()) <= num_workers
    assert loss_of(trainer, module) > 0
