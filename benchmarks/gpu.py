"""Pipelines on devices: ours and torch.distributed.pipelining beside one process, their time and the devices' memory.

python benchmarks/gpu.py                      # every device of this machine, about ten minutes
python benchmarks/gpu.py --quick              # one small case
python benchmarks/gpu.py --processes 4        # so many on one device, where there is one
python benchmarks/gpu.py --out results.json

On one device all processes share it: that shows what a pipeline costs there, and nothing that it could win. Contenders
take turns in one run; memory is then measured with one contender at a time, contexts and caches included.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import Contender, Process, free_port, interleave, middle, table
from models import Case

_LOOK_S = 0.005


@dataclass(frozen=True)
class Machine:
    """What there is to compute on."""

    kind: str
    name: str
    num_devices: int

    @classmethod
    def here(cls) -> Machine | None:
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None:
            return None
        module = torch.get_device_module(found)
        name = module.get_device_name(0) if hasattr(module, "get_device_name") else found.type
        return cls(found.type, name, torch.accelerator.device_count())

    @property
    def accelerator(self) -> str:
        """As Lightning calls it."""
        return "gpu" if self.kind == "cuda" else self.kind


def cases(processes: int, quick: bool) -> list[Case]:
    small = Case("d=256, 128 tokens", "transformer", 2 * processes, (4, 128, 256), 8)
    large = Case("d=2048, 512 tokens", "transformer", 4 * processes, (4, 512, 2048), 8, num_heads=16)
    return [small] if quick else [small, large]


def contenders_of(machine: Machine, processes: int) -> dict[str, Callable[[], Contender]]:
    """Return how to start each contender, by name."""
    share = machine.num_devices < processes
    network = {"workers_per_device": processes if share else 1}
    ours = {"devices": 1 if share else processes, "accelerator": machine.accelerator, "driver_stage": True}
    alone = {"devices": 1, "accelerator": machine.accelerator}
    found: dict[str, Callable[[], Contender]] = {"one process": partial(_trainer, "one process", alone, 1)}
    for backend in ("gloo",) if share or machine.kind != "cuda" else ("gloo", "nccl"):
        for schedule in ("gpipe", "1f1b"):
            name, own = f"ours {schedule}, {backend}", {"schedule": schedule, "network": network | {"backend": backend}}
            found[name] = partial(_trainer, name, ours | own, processes)
    if not share and machine.kind == "cuda":  # NCCL takes one process for each GPU
        for schedule in ("gpipe", "1f1b"):
            found[f"torch {schedule}, nccl"] = partial(_torch, machine, schedule, processes)
    return found


def _trainer(name: str, settings: dict[str, Any], processes: int) -> Contender:
    return Contender(name, [Process("trainer", settings)], processes)


def _torch(machine: Machine, schedule: str, size: int) -> Contender:
    shared = {"size": size, "store": f"127.0.0.1:{free_port()}", "schedule": schedule, "backend": "nccl"}
    ranks = [Process("torch", shared | {"rank": rank, "device": f"{machine.kind}:{rank}"}) for rank in range(size)]
    return Contender(f"torch {schedule}, nccl", ranks, size)


@contextmanager
def started(contenders: Sequence[Contender]) -> Iterator[None]:
    try:
        for contender in contenders:
            contender.await_start()
        yield
    finally:
        for contender in contenders:
            contender.close()


class MemoryWatch:
    """Looks at what is in use on each device, contexts and caches of all processes included."""

    def __init__(self, num_devices: int) -> None:
        self._devices = range(num_devices)
        self._over = threading.Event()
        self._before = self._used()
        self.peak_mb = [0.0] * num_devices

    def _used(self) -> list[float]:
        infos = [torch.accelerator.get_memory_info(device) for device in self._devices]
        return [(total - free) / 2**20 for free, total in infos]

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            used = zip(self._used(), self._before, strict=True)
            self.peak_mb = [max(peak, now - before) for peak, (now, before) in zip(self.peak_mb, used, strict=True)]

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def run_case(machine: Machine, case: Case, processes: int, rounds: int, steps: int) -> dict[str, Any]:
    """Time all contenders in turns, then look at the memory that each takes alone."""
    makers = contenders_of(machine, processes)
    racing = [make() for make in makers.values()]
    with started(racing):
        for contender in racing:
            contender.build(case, 3)
        samples = interleave(racing, rounds, steps)
    check_equal({name: runs[-1]["loss"] for name, runs in samples.items()})
    peaks = {}
    for name, make in makers.items():
        with MemoryWatch(machine.num_devices) as watch:
            alone = make()
            with started([alone]):
                alone.build(case, 3)
                alone.sample(steps)
        peaks[name] = watch.peak_mb
    return {"case": asdict(case), "processes": processes, "samples": samples, "peak_mb": peaks}


def check_equal(losses: dict[str, float]) -> None:
    """Nobody may be faster by computing something else."""
    middle_value = median(losses.values())
    for name, loss in losses.items():
        if abs(loss - middle_value) > 1e-3 * abs(middle_value):
            raise RuntimeError(f"losses differ: {name} has {loss}, but the median of all is {middle_value}")


def report(machine: Machine, result: dict[str, Any]) -> None:
    """Print times beside one process and beside what P devices could do at best: (m + P - 1) / m of a P-th."""
    case, processes = Case.of(result["case"]), result["processes"]
    times = {name: middle(runs, "wall_s") for name, runs in result["samples"].items()}
    one, count = times["one process"], case.num_microbatches
    devices = min(processes, machine.num_devices)
    bound = one / devices * (count + devices - 1) / count
    rows = [
        [
            name,
            f"{1e3 * taken:.1f}",
            f"{taken / one:.2f}",
            f"{taken / bound:.2f}" if name != "one process" else "",
            " ".join(f"{peak:.0f}" for peak in result["peak_mb"][name]),
        ]
        for name, taken in times.items()
    ]
    where = f"{processes} processes on {devices} x {machine.name}"
    print(f"\n{case.name}, {case.num_blocks} blocks, {count} microbatches of {case.microbatch[0]}; {where}")
    print(table(["", "ms a step", "of one process", "of the bound", "peak MB of each device"], rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="how many compute; all devices, or two on one")
    parser.add_argument("--quick", action="store_true", help="one small case, few samples")
    parser.add_argument("--out", type=Path, help="write all samples to this file, as JSON")
    arguments = parser.parse_args()
    machine = Machine.here()
    if machine is None:
        print("this machine has no accelerator that torch knows; benchmarks/overhead.py measures on CPUs")
        return 1
    processes = arguments.processes or max(2, machine.num_devices)
    rounds, steps = (3, 3) if arguments.quick else (11, 5)
    results = []
    for case in cases(processes, arguments.quick):
        results.append(run_case(machine, case, processes, rounds, steps))
        report(machine, results[-1])
    if arguments.out:
        facts = {"machine": asdict(machine), "torch": torch.__version__, "time": time.time(), "results": results}
        arguments.out.write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
