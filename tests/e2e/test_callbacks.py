"""Callbacks and tools that reach into the model: those that work as in one process, and those that say they cannot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import SkipPipeStrategy
from tests.grids import all_slow_but, slow

from .models import Transformer, next_token_loss, tokens
from .modules import BATCH, Classifier, LanguageModel, loader, momentum, points
from .support import Run, assert_same_run, train, trainer_for

PIPELINE: dict[str, Any] = {"num_microbatches": 4}


def trainable_adamw(module: nn.Module) -> Optimizer:
    return AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)


def trainable_sgd(module: nn.Module) -> Optimizer:
    return SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class Unfreeze(BaseFinetuning):
    """Unfreezes a block after one epoch; another one and the embedding after two."""

    def freeze_before_training(self, module: LightningModule) -> None:
        net = module.model
        self.freeze([net.embedding, net.blocks[0], net.blocks[3]])

    def finetune_function(self, module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        net = module.model
        if epoch == 1:
            self.unfreeze_and_add_param_group(net.blocks[0], optimizer, lr=1e-3)
        if epoch == 2:
            self.unfreeze_and_add_param_group([net.blocks[3], net.embedding], optimizer, lr=2e-3)


class Backbone(LightningModule):
    """All but the head is the backbone that BackboneFinetuning freezes at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Transformer()
        self.head = self.backbone.head
        self.backbone.head = nn.Identity()

    def training_step(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.head(self.backbone(batch)), batch)

    def configure_optimizers(self) -> Optimizer:
        return trainable_adamw(self)


def _both(make: Any, callback: Any, **options: Any) -> tuple[Run, Run]:
    data = loader(tokens(BATCH * 4))
    options = {"max_steps": -1, "max_epochs": 4, **options}
    pipeline = train(make, data, 3, PIPELINE, callbacks=[callback()], **options)
    return pipeline, train(make, data, 1, callbacks=[callback()], **options)


@pytest.mark.parametrize("optimizer", [slow(trainable_adamw), trainable_sgd])
def test_blocks_are_unfrozen_in_the_middle_of_a_run(optimizer: Any) -> None:
    pipeline, plain = _both(lambda: LanguageModel(Transformer(), optimizer), Unfreeze)
    assert len(plain.trainer.optimizers[0].param_groups) > 1
    assert_same_run(pipeline, plain)


def test_a_backbone_is_unfrozen() -> None:
    def callback() -> BackboneFinetuning:
        return BackboneFinetuning(1, lambda epoch: 1.5, backbone_initial_ratio_lr=0.1)

    assert_same_run(*_both(Backbone, callback, gradient_clip_val=0.5))


def test_a_finetuned_run_is_resumed(tmp_path: Path) -> None:
    """Another number of parameter groups than at the start is saved and restored."""
    data = loader(tokens(BATCH * 4))

    def run(devices: int, **options: Any) -> Run:
        options = {"max_steps": -1, "max_epochs": 4, "callbacks": [Unfreeze()], **options}
        strategy = PIPELINE if devices > 1 else None
        return train(lambda: LanguageModel(Transformer(), trainable_adamw), data, devices, strategy, **options)

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / f"{3 if isinstance(trainer.strategy, SkipPipeStrategy) else 1}.ckpt")

    for devices in (1, 3):
        run(devices, callbacks=[Unfreeze(), Save()])
    plain = run(1, ckpt_path=str(tmp_path / "1.ckpt"))
    assert_same_run(run(2, ckpt_path=str(tmp_path / "1.ckpt")), plain)
    assert_same_run(run(1, ckpt_path=str(tmp_path / "3.ckpt")), plain)


AVERAGING = {
    "swa": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    "averaging": WeightAveraging,
    "moving average": lambda: EMAWeightAveraging(decay=0.5),
}


@pytest.mark.parametrize("name", all_slow_but(AVERAGING, "swa", "averaging"))
def test_callbacks_that_average_all_weights_do_so_as_in_one_process(name: str) -> None:
    def run(devices: int) -> Run:
        data, options = loader(tokens(BATCH * 2)), {"max_steps": -1, "max_epochs": 3, "callbacks": [AVERAGING[name]()]}
        return train(lambda: LanguageModel(Transformer()), data, devices, val_data=loader(tokens(BATCH)), **options)

    assert_same_run(run(3), run(1))


class Normalised(Classifier):
    """Has BatchNorm in its blocks and around them, whose statistics SWA computes anew in an epoch without steps."""

    def __init__(self) -> None:
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(4)]
        super().__init__(nn.Sequential(*blocks, nn.BatchNorm1d(8), nn.Linear(8, 4)), momentum)


def test_statistics_of_batches_are_computed_anew_for_averaged_weights() -> None:
    def run(devices: int) -> Run:
        options = {"max_steps": -1, "max_epochs": 3, "callbacks": [StochasticWeightAveraging(1e-3, swa_epoch_start=1)]}
        pipeline = {"num_microbatches": 1} if devices > 1 else None
        return train(Normalised, loader(points(BATCH * 2)), devices, pipeline, **options)

    assert_same_run(run(3), run(1))


def test_pruning_while_it_trains_is_refused() -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(SkipPipeError, match=r"blocks while they train \(model\.blocks\.0\..*on the workers"):
        train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH)), 3, PIPELINE, callbacks=[pruning])


class PrunedAround(LanguageModel):
    """Prunes what is not in its blocks."""

    def configure_callbacks(self) -> ModelPruning:
        layers = [(self.model.embedding, "weight"), (self.model.head, "weight")]
        return ModelPruning("l1_unstructured", layers, amount=0.5)


def test_pruning_around_the_blocks_is_exact() -> None:
    def run(devices: int) -> Run:
        options = {"max_steps": -1, "max_epochs": 3}
        return train(lambda: PrunedAround(Transformer()), loader(tokens(BATCH * 2)), devices, **options)

    expected = run(1)
    assert (expected.weights["model.head.weight"] == 0).sum() > 0
    assert_same_run(run(3), expected)


class Penalised(LanguageModel):
    """Computes with all weights on the driver."""

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + 1e-3 * sum(parameter.square().sum() for parameter in self.parameters())


def test_weights_on_workers_say_so_when_they_are_computed_with() -> None:
    with pytest.raises(SkipPipeError, match=r"depends on the value of model\.blocks.*itself"):
        train(lambda: Penalised(Transformer()), loader(tokens(BATCH)), 3, PIPELINE)
    # The run before left everything in order.
    train(lambda: LanguageModel(Transformer()), loader(tokens(BATCH)), 3, PIPELINE, max_steps=1)


class Norms(Callback):
    """Reads gradients before the step, as users do to log them."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.values.append(grad_norm(module, norm_type=2))


def test_gradients_can_be_read() -> None:
    norms = [Norms(), Norms()]
    data = loader(tokens(BATCH * 4))
    for devices, callback in zip((3, 1), norms, strict=True):
        train(lambda: LanguageModel(Transformer(), momentum), data, devices, callbacks=[callback], max_steps=4)
    for ours, theirs in zip(norms[0].values, norms[1].values, strict=True):
        own = {name: float(value) for name, value in ours.items()}
        assert "grad_2.0_norm/model.head.weight" in own
        assert own == pytest.approx({name: float(value) for name, value in theirs.items()}, rel=1e-3, abs=1e-6)


class Tunable(LanguageModel):
    """Has what the tuner changes."""

    def __init__(self) -> None:
        super().__init__(Transformer(), lambda module: AdamW(module.parameters(), lr=self.lr))
        self.lr = 1e-3
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(tokens(40), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(tokens(8), self.batch_size)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_tuner_finds_the_same_learning_rate(tmp_path: Path) -> None:
    found = []
    for devices in (3, 1):
        torch.manual_seed(0)
        module = Tunable()
        trainer = trainer_for(devices, PIPELINE if devices > 1 else None, max_steps=3, default_root_dir=tmp_path)
        finder = Tuner(trainer).lr_find(module, num_training=15)
        assert finder is not None
        trainer.fit(module)
        found.append((finder.suggestion(), module.lr, finder.results["loss"], trainer.callback_metrics["loss"]))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    assert float(found[0][3]) == pytest.approx(float(found[1][3]), rel=1e-5)


def test_the_tuner_scales_the_batch(tmp_path: Path) -> None:
    trainer = trainer_for(3, PIPELINE, max_steps=3, default_root_dir=tmp_path)
    module = Tunable()
    assert Tuner(trainer).scale_batch_size(module, max_trials=3, steps_per_trial=1) == module.batch_size > 2
