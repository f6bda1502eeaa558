"""Models that ``configure_model`` builds on the meta device: weights are made where they are owned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from .models import Transformer, next_token_loss, tokens
from .modules import BATCH, OPTIMIZERS, loader
from .support import Run, assert_same_losses, assert_same_weights, train, trainer_for

EPOCH = 5
PIPELINE: dict[str, Any] = {"num_microbatches": 4}


class Built(LightningModule):
    """Builds its network when the Trainer asks for it, on the device named."""

    def __init__(self, device: str = "meta", whole: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build_on = torch.device(device)
        self.whole = whole
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with self.build_on if self.whole else torch.device("cpu"):
            self.net = Transformer()
        if not self.whole:
            self.net.blocks.to_empty(device=self.build_on)

    def training_step(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.net(batch), batch)

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS["cosine"](self)


def _train(devices: int, *, device: str = "meta", whole: bool = True, **options: Any) -> Run:
    strategy = PIPELINE if devices > 1 else None
    return train(lambda: Built(device, whole), loader(tokens(BATCH * EPOCH)), devices, strategy, **options)


class Devices(Callback):
    """Notes where the weights are while it trains."""

    def __init__(self) -> None:
        self.elsewhere: set[str] = set()
        self.real: set[str] = set()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for name, parameter in module.named_parameters():
            (self.elsewhere if hasattr(parameter, "is_remote") else self.real).add(name)


@pytest.mark.parametrize("whole", [True, False], ids=["whole_network", "blocks_only"])
def test_weights_are_made_where_they_are_owned(whole: bool) -> None:
    devices = Devices()
    run = _train(3, whole=whole, callbacks=[devices])
    assert all("blocks" in name for name in devices.elsewhere)
    assert not any("blocks" in name for name in devices.real)
    assert run.losses[-1] < run.losses[0] < 5
    assert not any(tensor.is_meta for tensor in run.module.state_dict().values())
    norms = [run.weights[f"net.blocks.{index}.mlp.0.weight"].std().item() for index in range(6)]
    assert norms == pytest.approx([16**-0.5 / 3**0.5] * 6, rel=0.5)  # torch's own initialisation
    assert len(set(norms)) == 6


def _save(devices: int, folder: Path, **options: Any) -> str:
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=EPOCH, save_last=True)
    _train(devices, max_steps=EPOCH, callbacks=[checkpoint], enable_checkpointing=True, **options)
    return str(folder / "last.ckpt")


@pytest.mark.parametrize("whole", [True, False], ids=["whole_network", "blocks_only"])
def test_a_checkpoint_is_resumed_into_a_meta_model(whole: bool, tmp_path: Path) -> None:
    path = _save(1, tmp_path, device="cpu")
    resumed = _train(3, whole=whole, ckpt_path=path)
    plain = _train(1, device="cpu", ckpt_path=path)
    assert_same_losses(resumed.losses, plain.losses)
    assert_same_weights(resumed.weights, plain.weights)


def test_a_meta_model_saves_what_one_process_resumes(tmp_path: Path) -> None:
    path = _save(3, tmp_path)
    assert_same_losses(_train(2, ckpt_path=path).losses, _train(1, device="cpu", ckpt_path=path).losses)


def test_a_checkpoint_is_evaluated_in_a_meta_model(tmp_path: Path) -> None:
    path = _save(1, tmp_path, device="cpu")
    data = loader(tokens(10, seed=1))
    pipeline = trainer_for(3, PIPELINE).predict(Built(), data, ckpt_path=path)
    plain = trainer_for(1).predict(Built("cpu"), data, ckpt_path=path)
    torch.testing.assert_close(pipeline, plain)
