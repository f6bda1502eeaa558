"""One training that is to be killed, in any of several ways to survive it: it notes what it commits, and takes turns.

Started by `recovery.py`, directly or under torchrun, with its settings as JSON. What happens goes to a journal, a JSON
object per line, with the time of the clock that all processes of a host share.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from emulation import ByteDataset, ByteLM, default_text
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

SIZE = {"width": 64, "num_layers": 6, "context": 64}
BATCH = 16
_LOOK_S = 0.02


class Journal(Callback):
    """Writes down what happens, and holds training back while the gate is closed."""

    def __init__(self, path: Path, gate: Path) -> None:
        self._path, self._gate = path, gate

    def note(self, **fields: Any) -> None:
        with self._path.open("a") as file:  # a short line that is appended in one piece
            file.write(json.dumps({"at_s": time.monotonic(), **fields}) + "\n")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.note(event="start", pid=os.getpid(), step=trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        while not self._gate.exists():
            time.sleep(_LOOK_S)
        workers = getattr(trainer.strategy, "worker_pids", {})
        spares = getattr(trainer.strategy, "spare_pids", [])
        self.note(event="begin", step=trainer.global_step, workers=workers, spares=spares)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.note(event="commit", step=trainer.global_step)


def ours(settings: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """A driver and its workers, with StageRecovery."""
    from skippipe_plugin.callbacks import StageRecovery
    from skippipe_plugin.driver.recovery.report import RecoveryEvent
    from skippipe_plugin.strategies import SkipPipeStrategy

    class Noted(StageRecovery):
        def _note(self, event: RecoveryEvent) -> None:
            super()._note(event)
            journal.note(event="recovered", seconds=event.seconds, source=event.source, around=event.steps_around)

    recovery = Noted(**settings["recovery"])
    return {"strategy": SkipPipeStrategy(num_microbatches=4), "callbacks": [recovery, journal]}


def restarted(settings: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """What torchrun starts again, with Lightning's own checkpoints."""
    saver = ModelCheckpoint(settings["folder"], every_n_train_steps=settings["every"], save_last=True, save_top_k=1)
    return {"callbacks": [saver, journal], "enable_checkpointing": True}


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    journal = Journal(Path(settings["journal"]), Path(settings["gate"]))
    options = {"ours": ours, "restarted": restarted}[settings["kind"]](settings, journal)
    trainer = Trainer(
        accelerator="cpu",
        devices=settings["devices"],
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    data = DataLoader(ByteDataset(default_text(), SIZE["context"]), BATCH, shuffle=True, drop_last=True)
    last = Path(settings["folder"], "last.ckpt")
    trainer.fit(ByteLM(**SIZE), data, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    main()
