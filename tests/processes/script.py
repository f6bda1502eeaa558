"""A user's training script: ``script.py DEVICES DRIVERS [slow] [balanced] [experts] [port=N] [two_nodes] [pause]``.

``hosts``: each driver holds a stage. ``reads``: the step reads gradients. ``conditioned``: every block gets a tensor
that carries a gradient.
``shared``: the blocks have one layer in common, with the model and with each other.
``half``: in float16, with a loss scale that is too large at first.
``moves=+@1,-2@3 folder=PATH`` makes it elastic, see ``mortal.py``. Prints one JSON line per process.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader, TensorDataset

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear: nn.Module = nn.Linear(width, width)
        if "experts" in sys.argv:
            from skippipe_plugin.moe import MoELayer

            self.linear = MoELayer(width, 8, num_experts=4)

    def forward(self, hidden: Tensor, given: Tensor | None = None) -> Tensor:
        hidden = hidden + torch.tanh(self.linear(self.norm(hidden)))
        return hidden if given is None else hidden * (1 + given)


class Model(LightningModule):
    def __init__(self, delay_s: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))
        self.head = nn.Linear(16, 4)
        self.condition = nn.Linear(8, 16) if "conditioned" in sys.argv else None
        if "shared" in sys.argv:
            for block in self.blocks:
                block.linear = self.blocks[0].linear
            self.blocks[1].norm = self.blocks[4].norm = self.norm = nn.LayerNorm(16)
        self.losses: list[float] = []
        self.delay_s = delay_s

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.delay_s)
        if "pause" in sys.argv and len(self.losses) == 2:
            sys.stdout.write("half way\n")  # the test has a moment to interfere
            time.sleep(0.5)
        loss = self.loss_of(batch)
        if "reads" in sys.argv:
            gradients = [each.grad for each in self.head.parameters() if each.grad is not None]
            loss = loss * (1 + sum(float(gradient.norm()) for gradient in gradients))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss_of(batch), sync_dist=True)

    def loss_of(self, batch: list[Tensor]) -> Tensor:
        hidden = self.embedding(batch[0])
        given = () if self.condition is None else (torch.tanh(self.condition(batch[0])),)
        for block in self.blocks:
            hidden = block(hidden, *given)
        hidden = self.norm(hidden) if "shared" in sys.argv else hidden
        return nn.functional.cross_entropy(self.head(hidden), batch[1])

    def on_train_batch_end(self, outputs: dict[str, Tensor], batch: object, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(size: int) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator)
    return DataLoader(TensorDataset(inputs, labels), batch_size=8)


def strategy_for(devices: int, drivers: int) -> object:
    if devices == 0:  # the same data-parallel run without the plugin
        return "ddp" if drivers > 1 else "auto"
    from skippipe_plugin.moe import MoEConfig
    from skippipe_plugin.strategies import NetworkConfig, SkipPipeStrategy

    ports = [int(argument.removeprefix("port=")) for argument in sys.argv if argument.startswith("port=")]
    network = NetworkConfig(port=ports[0], local_workers=0, join_timeout_s=60) if ports else None
    replicas = 2 if {"balanced", "experts"} & set(sys.argv) else 1
    moe = MoEConfig(expert_parallel=2) if "experts" in sys.argv else None
    hosts = "hosts" in sys.argv
    return SkipPipeStrategy(
        num_microbatches=4, drivers=drivers, driver_stage=hosts, replicas=replicas, network=network, moe=moe
    )


def elastic() -> list[Callback]:
    given = dict(argument.split("=") for argument in sys.argv if argument.startswith(("moves=", "folder=")))
    if not given:
        return []
    from skippipe_plugin.callbacks import StageRecovery
    from tests.processes.mortal import Moves

    return [StageRecovery(spares=0, elastic=True), Moves(Path(given["folder"]), given["moves"])]


def balancers() -> list[Callback]:
    if "balanced" not in sys.argv:
        return []
    from skippipe_plugin.callbacks import LoadBalancer
    from skippipe_plugin.schedule.balance import SwitchRule

    SwitchRule.permits = lambda *_: True  # type: ignore[method-assign] # whether it pays is a matter of the machine
    return [LoadBalancer(every_n_steps=1, min_steps=1, window=1)]  # changes as often as it can


def main() -> None:
    devices, drivers = int(sys.argv[1]), int(sys.argv[2])
    seed_everything(1, verbose=False)
    callbacks = balancers()
    scaler = GradScaler("cpu", init_scale=2.0**23) if "half" in sys.argv else None
    model = Model(delay_s=0.05 if "slow" in sys.argv else 0.0)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices or drivers,
        num_nodes=2 if "two_nodes" in sys.argv else 1,
        strategy=strategy_for(devices, drivers),  # type: ignore[arg-type]
        max_steps=10_000 if "slow" in sys.argv else 5,
        callbacks=[*callbacks, *elastic()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if scaler is not None else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader(96), loader(32))
    validated = trainer.validate(model, loader(32), verbose=False)
    result = {
        "rank": int(next((os.environ[name] for name in RANKS if name in os.environ), "0")),
        "is_global_zero": trainer.is_global_zero,
        "losses": model.losses,
        "changes": sum(callback.changes for callback in callbacks),
        "validated": validated,
        "scale": 1.0 if scaler is None else scaler.get_scale(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")  # one write: several processes share the terminal
    sys.stdout.flush()


if __name__ == "__main__":
    main()
