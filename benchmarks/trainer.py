"""A contender that is a whole Lightning Trainer, with or without the strategy: what a user of the plugin sees."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from models import Case, loss_of, make_batch, make_blocks
from protocol import Console, Timer, forget_peak, memory_mb
from torch import Tensor, nn


class Module(lightning.LightningModule):
    """The stack of a case, trained on one batch over and over."""

    def __init__(self, case: Case, optimizer: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make_blocks(case))
        self._optimizer = optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        hidden, target = batch
        for block in self.blocks:
            hidden = block(hidden)
        return loss_of(hidden, target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # So small a rate changes nothing that a benchmark compares.
        return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self._optimizer](self.parameters(), lr=1e-12)


class Repeated:
    """Yields one batch for ever."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._batch


class Gate(lightning.Callback):
    """Runs steps when commands say so, and ends the fit when they say something else."""

    def __init__(self, console: Console, commands: Iterator[dict[str, Any]], warmup: int) -> None:
        self._console, self._commands = console, commands
        self._warmup = warmup
        self._timer: Timer | None = None
        self.next_case: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> int | None:
        if self._warmup or self._timer is not None:
            return None
        for command in self._commands:
            if "steps" in command:
                self._timer = Timer(command, processes())
                return None
            if "case" in command:
                self.next_case = command
                break
            self._console.answer(**memory(command["memory"]))
        trainer.should_stop = True
        return -1

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        if self._timer is not None and self._timer.over():
            self._console.answer(**self._timer.result(float(outputs["loss"])))
            self._timer = None
        if self._warmup:
            self._warmup -= 1
            if not self._warmup:
                self._console.answer(built=True)


def processes() -> list[int]:
    """This process and its children."""
    me = os.getpid()
    children = [int(child) for task in Path(f"/proc/{me}/task").iterdir() for child in _children(task)]
    return [me, *sorted(children)]


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def memory(what: str) -> dict[str, Any]:
    """Return the peak memory of all processes, or forget it."""
    if what == "forget":
        for pid in processes():
            forget_peak(pid)
        return {}
    return {"peak_mb": [memory_mb(pid) for pid in processes()]}


def serve_trainer(console: Console, settings: dict[str, Any]) -> None:
    """Fit one case after the other, a batch at a time."""
    commands = console.commands()
    console.answer(pids=[os.getpid()])
    command = next(commands, None)
    while command is not None and "case" in command:
        gate = Gate(console, commands, command["warmup"])
        with other_ranks(settings, command):
            fit(settings, Case.of(command["case"]), [gate])
        command = gate.next_case


def fit(settings: dict[str, Any], case: Case, callbacks: list[lightning.Callback]) -> None:
    """Train a case until a callback ends it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator=settings.get("accelerator", "cpu"),
        **_strategy(settings, case),
        max_epochs=-1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(case, settings.get("optimizer", "sgd")), Repeated(make_batch(case)))


@contextmanager
def other_ranks(settings: dict[str, Any], command: dict[str, Any]) -> Iterator[None]:
    """Launch the ranks after the first as torchrun does, each under a command of its own, and wait for their end."""
    if "ranks" not in settings:
        yield
        return
    host, port = settings["master"]
    size = settings["devices"]
    launch = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    launch |= {"TORCHELASTIC_RUN_ID": "benchmark", "RANK": 0, "LOCAL_RANK": 0}
    os.environ.update({name: str(value) for name, value in launch.items()})
    task = json.dumps({"settings": settings, "case": command["case"]})
    ranks = []
    for rank, prefix in enumerate(settings["ranks"], start=1):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command_line = [*prefix, sys.executable, str(Path(__file__).resolve()), task]
        ranks.append(subprocess.Popen(command_line, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr))
    try:
        yield
    finally:
        for process in ranks:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _strategy(settings: dict[str, Any], case: Case) -> dict[str, Any]:
    network = settings.get("network", {})
    if settings["devices"] == 1 and not network:
        return {"devices": 1}
    from skippipe_plugin.strategies import NetworkConfig, SkipPipeStrategy

    names = ("schedule", "driver_stage", "skip_ratio")
    options = {name: settings[name] for name in names if name in settings}
    if network:  # an older checkout that is measured beside this one may not know all of its settings
        options["network"] = NetworkConfig(**network)
    strategy = SkipPipeStrategy(num_microbatches=case.num_microbatches, **options)
    return {"devices": settings["devices"], "strategy": strategy}


def main() -> None:
    """Be one of the other ranks."""
    torch.set_num_threads(1)
    task = json.loads(sys.argv[1])
    fit(task["settings"], Case.of(task["case"]), [])


if __name__ == "__main__":
    main()
