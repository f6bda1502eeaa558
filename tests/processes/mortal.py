"""A training script that kills itself: ``mortal.py FOLDER DEVICES HOOK:COUNT,KIND:COUNT,... DROPOUT NUM_FITS``.

In each attempt it does so at another moment. It appends what it does to ``FOLDER/events`` and leaves ``FOLDER/end.pt``
when it comes to its end.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric

EPOCHS, BATCHES, BATCH = 2, 5, 8


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(self.norm(hidden))))


class Model(LightningModule):
    def __init__(self, folder: Path, dropout: float) -> None:
        super().__init__()
        self.embedding, self.frozen = nn.Linear(4, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.scale, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.seen = SumMetric()
        self.folder = folder

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.update(len(batch[0]))
        loss = self.loss_of(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(batch))

    def loss_of(self, batch: list[Tensor]) -> Tensor:
        hidden = self.frozen(self.embedding(batch[0]))
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(self.scale(hidden)), batch[1])

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.rand(())  # user code draws from the global generator, as the next epoch's permutation will

    def on_train_batch_end(self, outputs: Any, batch: list[Tensor], batch_idx: int) -> None:
        with torch.no_grad():  # as an averaged copy, which no optimizer steps
            self.frozen.weight.data.lerp_(self.embedding.weight @ self.embedding.weight.T, 0.1)
        event = {"batch": batch_idx, "loss": float(outputs["loss"]), "samples": batch[2].tolist()}
        self.note(event | {"epoch": self.current_epoch, "step": self.global_step})

    def on_validation_epoch_end(self) -> None:
        self.note({"validated": self.global_step, "val_loss": float(self.trainer.callback_metrics["val_loss"])})

    def on_train_epoch_end(self) -> None:
        seen, loss = float(self.seen.compute()), float(self.trainer.callback_metrics["loss_epoch"])
        self.note({"ended": self.current_epoch, "seen": seen, "epoch_loss": loss})
        self.seen.reset()

    def note(self, event: dict[str, Any]) -> None:
        with (self.folder / "events").open("a") as file:
            file.write(json.dumps(event) + "\n")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss_epoch"}}


def data(shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    size = BATCHES * BATCH
    inputs, labels = torch.randn(size, 4, generator=generator), torch.randint(0, 2, (size,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels, torch.arange(size)), batch_size=BATCH, shuffle=shuffle)


class Killer(Callback):
    """Kills the process when a hook is reached, or a kind of message was sent to one worker, for the n-th time."""

    def __init__(self, moment: str) -> None:
        from skippipe_plugin.driver.links import Link

        hook, _, count = moment.partition(":")
        self.left = int(count or 0)
        if hook.startswith("on_"):
            setattr(self, hook, self.reached)
        else:
            self.kind = hook
            Link.send, Link.tell = self.counted(Link.send), self.counted(Link.tell)  # type: ignore[method-assign]

    def reached(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, send: Callable[..., None]) -> Callable[..., None]:
        def patched(link: Any, kind: str, *args: Any, **kwargs: Any) -> None:
            send(link, kind, *args, **kwargs)
            if kind == self.kind:
                self.reached()

        return patched


def fit(
    folder: Path, devices: int = 1, callbacks: Sequence[Callback] = (), *, dropout: float = 0.0, **options: Any
) -> None:
    """Train; with one device by the plain Trainer."""
    seed_everything(3, verbose=False)
    strategy: Any = "auto"
    if devices > 1:
        from skippipe_plugin.strategies import SkipPipeStrategy

        strategy = SkipPipeStrategy(num_microbatches=1)
    model = Model(folder, dropout)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=EPOCHS,
        gradient_clip_val=0.5,
        callbacks=[*callbacks, ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=3)],
        logger=CSVLogger(str(folder)),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"val_check_interval": 3, **options},
    )
    trainer.fit(model, data(shuffle=True), data(shuffle=False))
    torch.save({"state_dict": model.state_dict(), "step": trainer.global_step}, folder / "end.pt")


def main() -> None:
    moments = sys.argv[3].split(",")
    attempt = int(os.environ["SKIPPIPE_ATTEMPT"])
    killers = [Killer(moments[attempt])] if attempt < len(moments) else []
    folder, num_fits = Path(sys.argv[1]), int(sys.argv[5])
    for number in range(num_fits):
        one = folder / str(number) if num_fits > 1 else folder
        one.mkdir(exist_ok=True)
        fit(one, int(sys.argv[2]), killers, dropout=float(sys.argv[4]))


if __name__ == "__main__":
    main()
