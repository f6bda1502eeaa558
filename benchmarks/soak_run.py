"""The process of ``soak.py`` that trains: one run after the other with its faults, each judged in a line of JSON.

Every record counts itself: block i adds a weight of the record to a reserved channel, and so does the model around the
blocks; the loss's gradient for it is 1 / batch, and its optimizer is SGD with a rate of 1. So after the run each such
weight says how often the record was used there, exactly.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric

from skippipe_plugin import NetworkConfig, PathConfig, RecoveryPolicy, SkipPipeConfig, TorchPipeline
from skippipe_plugin.accelerate import SkipPipe
from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.moe import MoEConfig, MoELayer
from skippipe_plugin.strategies import SkipPipeStrategy
from skippipe_plugin.testing import At, Cut, Fault, Injector, Kill, Phase, RefuseStart, Reset, Stop, crew

BATCH, WIDTH, VALIDATION = 8, 8, 16
EXACT = ("replica", "relieved", "driver")
"""Where a lost stage comes back without any change."""


class Block(nn.Module):
    """A residual layer, perhaps with experts, that counts."""

    def __init__(self, num_records: int, experts: bool) -> None:
        super().__init__()
        self.linear, self.count = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(num_records))
        self.moe = MoELayer(WIDTH, 8, 4, router="sigmoid") if experts else nn.Identity()

    def forward(self, hidden: Tensor, ids: Tensor) -> Tensor:
        state, counts = hidden[:, :WIDTH], hidden[:, WIDTH:]
        mixed = self.moe(state[None])[0]
        return torch.cat([state + torch.tanh(self.linear(mixed)), counts + self.count[ids].unsqueeze(1)], 1)


class Net(nn.Module):
    """Records to a loss; or, for a loop that computes it, to what it is computed from."""

    def __init__(self, num_records: int, depth: int, *, experts: bool, outside: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.outside = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2), outside
        self.seen = nn.Parameter(torch.zeros(num_records))
        self.blocks = nn.ModuleList(Block(num_records, experts) for _ in range(depth))

    def forward(self, inputs: Tensor, labels: Tensor, ids: Tensor) -> Any:
        hidden = torch.cat([self.embedding(inputs), inputs.new_zeros(len(inputs), 1)], 1)
        for block in self.blocks:
            hidden = block(hidden, ids)
        counted = hidden[:, WIDTH] + self.seen[ids]
        logits = torch.cat([self.head(hidden[:, :WIDTH]), counted.unsqueeze(1)], 1)
        return logits if self.outside else {"loss": loss_of(logits, labels)}

    def optimizer(self) -> torch.optim.Optimizer:
        named = list(self.named_parameters())
        counts = [each for name, each in named if name.endswith((".count", "seen"))]
        others = [each for name, each in named if not name.endswith((".count", "seen"))]
        return torch.optim.SGD([{"params": others, "lr": 0.05, "momentum": 0.9}, {"params": counts, "lr": 1.0}])


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    counted = logits[:, 2].mean()
    return nn.functional.cross_entropy(logits[:, :2], labels) + counted - counted.detach()


@dataclass(frozen=True)
class Setting:
    """A configuration that is drawn."""

    door: str
    stages: int
    replicas: int
    schedule: str
    accumulate: int
    skip: float
    experts: bool
    coupled: bool
    """Whether the experts are spread over the replicas, two sets of which there are then."""
    driver_stage: bool
    while_missing: str
    spares: int
    backend: str
    outside: bool
    drivers: int = 1
    steps: int = 16

    @property
    def num_workers(self) -> int:
        return self.replicas * (self.stages - self.driver_stage)

    def text(self) -> str:
        words = [self.door, f"{self.stages}x{self.replicas}", self.schedule, f"acc{self.accumulate}"]
        words += (
            [f"skip{self.skip:g}"] * bool(self.skip)
            + ["coupled" if self.coupled else "moe"] * self.experts
            + [f"drivers{self.drivers}"] * (self.drivers > 1)
        )
        flags = {"driver-stage": self.driver_stage, "around": self.while_missing == "skip", "outside": self.outside}
        return " ".join([*words, *(name for name, on in flags.items() if on), f"spares{self.spares}", self.backend])


def draw_setting(seed: int, drivers: int) -> Setting:
    rng = random.Random(f"setting {seed}")
    experts = rng.random() < 0.15
    coupled = experts and rng.random() < 0.5
    skip = 0.0 if experts or drivers > 1 else rng.choice([0.0, 0.0, 0.0, 0.25])
    stages = 1 if coupled else 4 if skip else rng.choice([2, 2, 3, 3, 4])
    door = "lightning" if drivers > 1 else rng.choice(["lightning"] * 3 + ["accelerate", "plain"])
    return Setting(
        door=door,
        stages=stages,
        replicas=4 if coupled else 1 if skip or stages == 4 else rng.choice([1, 2]),
        schedule=rng.choice(["auto", "gpipe", "1f1b"]),
        accumulate=rng.choice([1, 1, 1, 2, 4]),
        skip=skip,
        experts=experts,
        coupled=coupled,
        driver_stage=not experts and not skip and stages > 2 and rng.random() < 0.2,
        while_missing=rng.choice(["wait", "wait", "skip"]),
        spares=rng.choice([1, 1, 2]),
        backend=rng.choice(["gloo", "gloo", "gloo", "gloo-pairs"]),
        outside=door != "lightning" and rng.random() < 0.5,
        drivers=drivers,
    )


def draw_faults(seed: int, setting: Setting) -> tuple[Fault, ...]:
    """Draw a fault for about every second step, somewhere in it, and some for other phases."""
    rng = random.Random(f"faults {seed}")
    faults: list[Fault] = []
    for step in range(1, setting.steps - 1):
        if rng.random() < 0.7:
            faults.append(draw_fault(rng, setting, draw_moment(rng, step, setting)))
    rare = [Phase.HANDING_OVER, Phase.PROBING, Phase.FORMING, Phase.MEETING, Phase.TAKING_OVER, Phase.ENDING]
    faults.append(draw_fault(rng, setting, At(rng.choice(rare), nth=rng.randint(1, 2))))
    return tuple(faults)


def draw_moment(rng: random.Random, step: int, setting: Setting) -> At:
    delay_s = rng.choice([0.0, rng.uniform(0.0, 0.1)])
    where = rng.random()
    if where < 0.7:
        action = rng.choice(["", "", "0F1", "0L0", "0L2", "0B1"])
        return At(Phase.TRAINING, nth=rng.randint(1, setting.accumulate), step=step, action=action, delay_s=delay_s)
    if where < 0.8:
        return At(Phase.MERGING, nth=step * setting.accumulate, delay_s=delay_s)
    if where < 0.9:
        return At(Phase.STEPPING, nth=step, delay_s=delay_s)
    return At(rng.choice([Phase.VALIDATING, Phase.SAVING]), nth=rng.randint(1, 4), delay_s=delay_s)


def draw_fault(rng: random.Random, setting: Setting, at: At) -> Fault:
    kind = rng.choices(["kill", "stop", "cut", "reset", "refuse"], [15, 22, 23, 30, 10])[0]
    workers = range(1, setting.num_workers + 1)
    if kind == "kill":
        return Kill(at, rng.choice([*workers, *workers, "spare"]))
    if kind == "stop":
        return Stop(at, rng.choice([*workers, "spare"]), None if rng.random() < 0.15 else rng.uniform(0.05, 0.8))
    if kind == "refuse":
        return RefuseStart(at, ends=rng.random() < 0.5)
    first, second = sorted(rng.sample(range(setting.num_workers + 1), 2))
    if kind == "reset":
        return Reset(at, (first, second), rng.choice(["data", "data", "data", "control"]) if not first else "data")
    for_s = None if rng.random() < 0.04 else rng.uniform(0.1, 1.0)
    return Cut(at, (0, "all") if rng.random() < 0.2 else (first, second), for_s, "all" if for_s else "data")


# ------------------------------------------------------------------- training


def records(setting: Setting) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(setting.steps * setting.accumulate * BATCH, 4, generator=generator)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long(), torch.arange(len(inputs)))


class Module(LightningModule):
    """Trains the net under Lightning, and counts samples as users do."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.trained, self.validated = net, SumMetric(), SumMetric()
        self.validations: list[float] = []

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        self.trained.update(len(batch[0]))
        loss: Tensor = self.net(*batch)["loss"]
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.validated.update(len(batch[0]))
        self.log("validation", self.net(*batch)["loss"])

    def on_validation_epoch_end(self) -> None:
        self.validations.append(float(self.validated.compute()))
        self.validated.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.net.optimizer()


class Order(Callback):
    """Notes which records came when."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.ids += batch[2].tolist()


@dataclass
class Outcome:
    """What a run leaves."""

    net: Net
    order: list[int]
    trained: float
    validations: list[float]
    events: list[Any]


def run(setting: Setting, folder: str, *, recovers: bool) -> Outcome:
    torch.manual_seed(1)
    data = records(setting)
    net = Net(len(data), 2 * setting.stages, experts=setting.experts, outside=setting.outside)
    doors = {"lightning": run_lightning, "accelerate": run_accelerate, "plain": run_plain}
    return doors[setting.door](setting, net, data, folder, recovers)


def options(setting: Setting) -> dict[str, Any]:
    return {
        "skip_ratio": setting.skip,
        "schedule": setting.schedule,
        "num_microbatches": 4,
        "replicas": setting.replicas,
        "driver_stage": setting.driver_stage,
        "paths": PathConfig(costs="uniform"),
        "network": NetworkConfig(backend=setting.backend),
        "moe": MoEConfig(expert_parallel=2) if setting.coupled else None,
        "blocks": "net.blocks" if setting.door == "lightning" else "blocks",
        "verbose": False,
    }


def policy(setting: Setting) -> dict[str, Any]:
    return {
        "spares": setting.spares,
        "lr_factor": 1.0,
        "heartbeat_s": 3.0,
        "while_missing": setting.while_missing,
    }


def run_lightning(setting: Setting, net: Net, data: TensorDataset, folder: str, recovers: bool) -> Outcome:
    module, order, recovery = Module(net), Order(), StageRecovery(**policy(setting))
    strategy = SkipPipeStrategy(drivers=setting.drivers, **options(setting))
    validation = TensorDataset(*(each[:VALIDATION] for each in data.tensors))
    trainer = Trainer(
        accelerator="cpu",
        devices=setting.num_workers + setting.drivers,
        strategy=strategy,
        callbacks=[order, recovery] if recovers and setting.drivers == 1 else [order],
        max_epochs=1,
        accumulate_grad_batches=setting.accumulate,
        val_check_interval=8 * setting.accumulate,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=True,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, BATCH // setting.drivers), DataLoader(validation, BATCH // setting.drivers))
    events = list(recovery.events)
    return Outcome(net, order.ids, float(module.trained.compute()), module.validations, events)


def run_accelerate(setting: Setting, net: Net, data: TensorDataset, folder: str, recovers: bool) -> Outcome:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=setting.accumulate)
    model, optimizer, batches = accelerator.prepare(net, net.optimizer(), DataLoader(data, BATCH))
    order: list[int] = []
    with SkipPipe(accelerator, model, config(setting, recovers)) as pipe:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_in(model, batch, setting))
                optimizer.step()
                optimizer.zero_grad()
            order += batch[2].tolist()
        events = pipe.events
    return Outcome(net, order, float(len(order)), [], [*events])


def run_plain(setting: Setting, net: Net, data: TensorDataset, folder: str, recovers: bool) -> Outcome:
    optimizer, order = net.optimizer(), list[int]()
    with TorchPipeline(net, optimizer, config(setting, recovers)) as pipe:
        for index, batch in enumerate(DataLoader(data, BATCH)):
            (loss_in(net, batch, setting) / setting.accumulate).backward()
            if (index + 1) % setting.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            order += batch[2].tolist()
        events = pipe.events
    return Outcome(net, order, float(len(order)), [], [*events])


def config(setting: Setting, recovers: bool) -> SkipPipeConfig:
    recovery = RecoveryPolicy(**policy(setting)) if recovers else None
    return SkipPipeConfig(num_stages=setting.stages, recovery=recovery, **options(setting))


def loss_in(model: Callable[..., Any], batch: Sequence[Tensor], setting: Setting) -> Tensor:
    output = model(*batch)
    return loss_of(output, batch[1]) if setting.outside else output["loss"]


# -------------------------------------------------------------------- judging


def judge(setting: Setting, found: Outcome, expected: Outcome) -> list[str]:
    """Return what is wrong."""
    wrong: list[str] = []
    num = setting.steps * setting.accumulate * BATCH
    if found.order != (list(range(num)) if setting.drivers == 1 else expected.order):
        wrong.append(f"order: {len(found.order)} of {num} records, or not in order")
    if found.trained != num:
        wrong.append(f"metric: {found.trained:g} of {num} samples")
    if found.validations != expected.validations:
        wrong.append(f"validation: {found.validations} instead of {expected.validations} samples")
    wrong += uses("around the blocks", found.net.seen, setting)
    if not setting.skip and not any(event.steps_around for event in losses(found)):
        for index, block in enumerate(found.net.blocks):
            wrong += uses(f"block {index}", block.count, setting)  # type: ignore[arg-type]
    if same_weights(setting, found):
        weights = expected.net.state_dict()
        for name, tensor in found.net.state_dict().items():
            if not torch.allclose(tensor, weights[name], rtol=1e-4, atol=1e-5):
                wrong.append(f"weights: {name} differs by {(tensor - weights[name]).abs().max():.2g}")
    return wrong


def uses(where: str, count: Tensor, setting: Setting) -> list[str]:
    used = -count.detach() * BATCH * setting.accumulate
    bad = (used - 1).abs() > 1e-3
    return [f"samples: {where} used {int(bad.sum())} records not once ({used[bad][:3].tolist()})"] if bad.any() else []


def losses(found: Outcome) -> list[Any]:
    return [event for event in found.events if hasattr(event, "source")]


def same_weights(setting: Setting, found: Outcome) -> bool:
    """Whether the run is promised to end with the undisturbed one's weights."""
    return all(event.source in EXACT and not (event.steps_around and setting.replicas == 1) for event in losses(found))


def attempt(seed: int, drivers: int, folder: str) -> dict[str, Any]:
    setting = draw_setting(seed, drivers)
    faults = draw_faults(seed, setting)
    result: dict[str, Any] = {"seed": seed, "setting": setting.text(), "planned": len(faults), "error": ""}
    begun_s = time.monotonic()
    expected = run(setting, folder, recovers=False)
    wrong = judge(setting, expected, expected)
    result["undisturbed_s"] = time.monotonic() - begun_s
    injector, found = Injector(*faults, seed=seed), None
    try:
        with injector:
            found = run(setting, folder, recovers=True)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    if found is not None:
        wrong += judge(setting, found, expected)
        result["events"] = [event.source for event in losses(found)]
        result["weights_judged"] = same_weights(setting, found)
    else:
        result["events"], result["weights_judged"] = [], False
    done = [type(each.fault).__name__ for each in injector.report if each.done]
    story = [str(each) for each in injector.report]
    return {**result, "faults": done, "wrong": wrong, "story": story, "seconds": time.monotonic() - begun_s}


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--drivers", type=int, default=1)
    parser.add_argument("--die-after", type=float, help="SIGKILL so many seconds into the last run")
    parser.add_argument("--out", required=True, help="file of lines of JSON")
    given = parser.parse_args(None if arguments is None else list(arguments))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    first = os.environ.get("RANK", "0") == "0"
    with Path(given.out).open("a", buffering=1) as out, tempfile.TemporaryDirectory() as folder:
        for seed in given.seeds:
            if first:
                out.write(json.dumps({"begins": seed}) + "\n")
            if given.die_after is not None and seed == given.seeds[-1]:
                threading.Timer(given.die_after, os.kill, [os.getpid(), signal.SIGKILL]).start()
            result = attempt(seed, given.drivers, folder)
            if first:
                out.write(json.dumps({**result, "ports": sorted(crew.control_ports())}) + "\n")


if __name__ == "__main__":
    main()
