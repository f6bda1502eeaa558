"""A training script that kills itself: ``mortal.py FOLDER MOMENT,MOMENT,... SETTINGS``.

In each attempt it does so at another moment, ``HOOK:COUNT`` or ``KIND:COUNT`` of a message; ``HOOK:COUNT:RANKS`` kills
the workers of these ranks too, or only them without the 0 of the driver; ``HOOK:COUNT:host`` kills the supervisor, and
with it all that runs here; ``MOMENT+MOMENT`` are two in one attempt. It
appends what it does to ``FOLDER/events`` and leaves ``FOLDER/end.pt`` when it comes to its end.

The settings are those of :func:`fit`, in JSON, with ``num_fits`` and ``moves``. These make the run elastic:
``+@2,-1@5`` has a worker join by hand before the step after the second one, and the worker of rank 1 leave before the
step after the fifth; ``-@5`` has all leave that did not join by hand.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics import SumMetric

EPOCHS, BATCHES, BATCH = 2, 5, 8
SIZE = BATCHES * BATCH
Data = Literal["plain", "iterable", "workers"]
Sample = tuple[Tensor, Tensor, int]


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
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        event["scaler"] = 1.0 if scaler is None else scaler.get_scale() * 1000 + scaler._get_growth_tracker()
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


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(SIZE, 4, generator=generator), torch.randint(0, 2, (SIZE,), generator=generator)
    return TensorDataset(inputs, labels, torch.arange(SIZE))


class Stream(IterableDataset[Sample]):
    """Draws the order of an epoch when it begins, and noise with each sample."""

    def __iter__(self) -> Iterator[Sample]:
        tensors = samples().tensors
        for index in torch.randperm(SIZE).tolist():
            inputs, label, number = (tensor[index] for tensor in tensors)
            yield inputs + 0.1 * torch.randn(4), label, number


class Noisy(Dataset[Sample]):
    """Draws noise with each sample, in whatever process asks for it."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Sample:
        inputs, label, number = samples()[index]
        return inputs + 0.1 * torch.randn(4), label, number


def training_data(kind: Data) -> DataLoader[Any]:
    if kind == "iterable":
        return DataLoader(Stream(), batch_size=BATCH)
    if kind == "workers":
        return DataLoader(Noisy(), batch_size=BATCH, shuffle=True, num_workers=2)
    return DataLoader(samples(), batch_size=BATCH, shuffle=True)


class Killer(Callback):
    """Kills processes when a hook is reached, or a kind of message was sent to one worker, for the n-th time.

    A kind of message is the name of its class.
    """

    def __init__(self, moment: str) -> None:
        from skippipe_plugin.driver.links import Link

        hook, count, ranks = (*moment.split(":"), "0")[:3]
        self.left, self.loses_host = int(count or 0), ranks == "host"
        self.ranks = [0] if self.loses_host else sorted(map(int, ranks), reverse=True)
        self.trainer: Trainer | None = None
        if hook.startswith("on_"):
            setattr(self, hook, self.reached)
        else:
            self.kind = hook
            Link.tell = self.counted(Link.tell)  # type: ignore[method-assign]

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.trainer = trainer

    def reached(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            pids = {0: os.getpid()}
            if any(self.ranks):
                pids |= self.workers()
            if self.loses_host:
                os.kill(os.getppid(), signal.SIGKILL)
            for rank in self.ranks:  # the driver last
                os.kill(pids[rank], signal.SIGKILL)

    def workers(self) -> dict[int, int]:
        """The workers' process ids by rank, once the spares are there that StageRecovery keeps."""
        assert self.trainer is not None
        strategy: Any = self.trainer.strategy
        policies = [callback.policy for callback in self.trainer.callbacks if hasattr(callback, "policy")]
        wait_for(lambda: len(strategy.spare_pids) >= sum(policy.spares for policy in policies))
        return dict(strategy.worker_pids)

    def counted(self, tell: Callable[..., int]) -> Callable[..., int]:
        from skippipe_plugin.engine.control.line import Said
        from skippipe_plugin.engine.control.messages import TO_WORKER

        assert self.kind in TO_WORKER.kinds, f"{self.kind} is no message"

        def patched(link: Any, body: object, **how: Any) -> int:
            number = tell(link, body, **how)
            if type(body.body if isinstance(body, Said) else body).__name__ == self.kind:
                self.reached()
            return number

        return patched


class Moves(Callback):
    """Lets workers join and leave before given steps, each once, however often the driver is started."""

    def __init__(self, folder: Path, moves: str) -> None:
        self.folder = folder
        self.moves = [(what, int(step)) for what, _, step in (move.partition("@") for move in moves.split(","))]
        self.has_begun = False

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (
            not self.has_begun
        ):  # who came back to another driver is used while there are steps, however busy the host is
            self.has_begun = True
            self.await_joined(trainer)
        for number, (what, step) in enumerate(self.moves):
            done = self.folder / f"move{number}"
            if step == trainer.global_step and not done.exists():
                done.touch()
                links = trainer.strategy._spread.links  # type: ignore[attr-defined]
                if what == "+":
                    self.join(trainer)
                else:
                    self.leave([link for link in links if what in (f"-{link.rank}", "-" + link.name)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        with (self.folder / "stages").open("a") as file:
            file.write(f"{len(trainer.strategy._spread.pipeline.layout.stage_blocks)}\n")  # type: ignore[attr-defined]

    def join(self, trainer: Trainer) -> None:
        job = trainer.strategy._job  # type: ignore[attr-defined]
        there = len(job.joined())
        command = [sys.executable, "-m", "skippipe_plugin.cli", "worker", "--join", "{}:{}".format(*job.pool.address)]
        environment = os.environ | {"SKIPPIPE_SECRET": job.pool.secret}
        with (self.folder / "joined").open("a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        with (self.folder / "pids").open("a") as file:
            file.write(f"{process.pid}\n")
        wait_for(lambda: len(job.joined()) > there)
        self.await_joined(trainer)

    def await_joined(self, trainer: Trainer) -> None:
        """Wait until all that are idle are awake, and have imported what they will need."""
        job, keeper = trainer.strategy._job, trainer.strategy._spread.pipeline.keeper  # type: ignore[attr-defined]
        wait_for(lambda: all(link.is_awake for link in job.resting()))
        keeper._warm_spares()
        wait_for(lambda: all(link.warm for link in job.idle()))

    def leave(self, links: Sequence[Any]) -> None:
        for link in links:
            os.kill(link.pid, signal.SIGTERM)
        wait_for(lambda: all(link.leaving for link in links))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "what the script waits for did not come"
        time.sleep(0.02)


def fit(
    folder: Path,
    devices: int = 1,
    callbacks: Sequence[Callback] = (),
    *,
    dropout: float = 0.0,
    replicas: int = 1,
    recovery: dict[str, Any] | None = None,
    data: Data = "plain",
    network: dict[str, Any] | None = None,
    loss_scale: float | None = None,
    shared: bool = False,
    **options: Any,
) -> None:
    """Train; with one device by the plain Trainer."""
    seed_everything(3, verbose=False)
    strategy: Any = "auto"
    if devices > 1:
        from skippipe_plugin.callbacks import StageRecovery
        from skippipe_plugin.strategies import NetworkConfig, SkipPipeStrategy

        strategy = SkipPipeStrategy(num_microbatches=1, replicas=replicas, network=NetworkConfig(**(network or {})))
        callbacks = [*callbacks, *([StageRecovery(**recovery)] if recovery is not None else [])]
    if loss_scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, growth_interval=4)
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    model = Model(folder, dropout)
    if shared:  # one layer at every depth, with a part of the model's
        model.blocks = nn.ModuleList([model.blocks[0]] * 4)
        model.blocks[0].linear.bias = model.embedding.bias
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
    trainer.fit(model, training_data(data), DataLoader(samples(), batch_size=BATCH))
    torch.save({"state_dict": model.state_dict(), "step": trainer.global_step}, folder / "end.pt")


def main() -> None:
    folder, moments, settings = Path(sys.argv[1]), [*filter(None, sys.argv[2].split(","))], json.loads(sys.argv[3])
    attempt = int(os.environ["SKIPPIPE_ATTEMPT"])
    killers = list(map(Killer, moments[attempt].split("+"))) if attempt < len(moments) else []
    num_fits, moves = settings.pop("num_fits", 1), settings.pop("moves", "")
    for number in range(num_fits):
        one = folder / str(number) if num_fits > 1 else folder
        one.mkdir(exist_ok=True)
        fit(one, callbacks=[*killers, *elastic(one, moves)], **settings)


def elastic(folder: Path, moves: str) -> list[Callback]:
    from skippipe_plugin.callbacks import StageRecovery

    return [StageRecovery(spares=0, elastic=True), Moves(folder, moves)] if moves else []


if __name__ == "__main__":
    main()
