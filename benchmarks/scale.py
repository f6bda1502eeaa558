"""What a driver and its workers hold of a large model, moment by moment, and how long a fit takes to begin and to end.

Each arm is a Trainer of its own process, AdamW, three steps; arms take turns. Peaks are of resident memory since the
moment before. Where the blocks are built on the workers, the driver never has any of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import table
from protocol import forget_peak, memory_mb

MOMENTS = ("built", "handed over", "first step", "last step", "fit over")
NUM_BLOCKS = 16


@dataclass(frozen=True)
class Arm:
    """How a model is trained."""

    name: str
    workers: int
    gather: str = ""
    meta: bool = False
    """Whether its blocks are built where they are trained."""


def arms_of(workers: int) -> list[Arm]:
    return [
        Arm("one process", 0),
        Arm('ours, gather="always"', workers, "always"),
        Arm('ours, gather="never"', workers, "never"),
        Arm("the same, built on the workers", workers, "never", meta=True),
    ]


def run(arm: Arm, gigabytes: float) -> dict[str, Any]:
    """Train once in a process of its own; return seconds and megabytes by moment."""
    command = [sys.executable, __file__, "--arm", json.dumps(arm.__dict__), "--gigabytes", str(gigabytes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    found: dict[str, Any] = {"s": {}, "driver_mb": {}, "worker_mb": 0.0, "parameters": 0}
    for line in process.stdout:
        if not line.startswith('{"moment"'):
            continue
        said = json.loads(line)
        found["s"][said["moment"]] = said["s"]
        found["driver_mb"][said["moment"]] = memory_mb(process.pid)
        found["worker_mb"] = max([found["worker_mb"], *map(memory_mb, _children(process.pid))])
        found["parameters"] = said["parameters"]
        forget_peak(process.pid)
    if process.wait(60):
        raise RuntimeError(f"{arm.name} ended with status {process.returncode}")
    return found


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def train(arm: Arm, gigabytes: float) -> None:
    """The child: fit a model, and say when it comes to each of the moments."""
    import lightning.pytorch as lightning
    import torch
    from torch import Tensor, nn

    width = int((gigabytes * 1e9 / 4 / NUM_BLOCKS / 8) ** 0.5)
    began_s = time.monotonic()

    def say(moment: str, module: nn.Module) -> None:
        seconds, parameters = time.monotonic() - began_s, sum(each.numel() for each in module.parameters())
        print(json.dumps({"moment": moment, "s": seconds, "parameters": parameters}), flush=True)
        time.sleep(0.2)  # for who looks at the memory

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + self.down(torch.relu(self.up(hidden)))

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(width, 10)
            self.blocks: Any = None
            if not arm.meta:
                self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

        def configure_model(self) -> None:
            if self.blocks is None:
                with torch.device("meta"):
                    self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            hidden, target = batch
            for block in self.blocks:
                hidden = block(hidden)
            return nn.functional.cross_entropy(self.head(hidden), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

        def on_train_start(self) -> None:
            say("handed over", self)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            if index in (0, 2):
                say("first step" if index == 0 else "last step", self)

    torch.set_num_threads(1)
    module = Module()
    options: dict[str, Any] = {"devices": 1}
    say("built", module)
    if arm.workers:
        from skippipe_plugin.strategies import SkipPipeStrategy

        strategy = SkipPipeStrategy(num_microbatches=4, gather=arm.gather, verbose=False)  # type: ignore[arg-type]
        options = {"devices": arm.workers + 1, "strategy": strategy}
    data = torch.utils.data.TensorDataset(torch.randn(48, width), torch.arange(48) % 10)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    say("fit over", module)


def row(arm: Arm, samples: Sequence[dict[str, Any]]) -> list[str]:
    def middle(what: str, moment: str) -> float:
        return statistics.median(sample[what][moment] for sample in samples)

    peaks = [f"{middle('driver_mb', moment):,.0f}" for moment in MOMENTS]
    worker = statistics.median(sample["worker_mb"] for sample in samples)
    first = middle("s", "first step") - middle("s", "built")
    end = middle("s", "fit over") - middle("s", "last step") - 0.2  # what saying so takes
    return [arm.name, *peaks, f"{worker:,.0f}" if arm.workers else "-", f"{first:.1f}", f"{end:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of block weights in float32")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the samples as JSON")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        train(Arm(**json.loads(options.arm)), options.gigabytes)
        return
    arms = arms_of(options.workers)
    samples: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number in range(options.rounds):
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            samples[arm.name].append(run(arm, options.gigabytes))
    header = ["", *(f"driver MB, {moment}" for moment in MOMENTS), "worker MB", "first step s", "end s"]
    print(f"{options.gigabytes:g} GB of blocks, AdamW, driver + {options.workers} workers, {options.rounds} rounds\n")
    print(table(header, [row(arm, samples[arm.name]) for arm in arms]))
    if options.out:
        options.out.write_text(json.dumps({"gigabytes": options.gigabytes, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
