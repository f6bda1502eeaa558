"""What the pipeline costs: ours and torch.distributed.pipelining side by side on the same model.

python benchmarks/overhead.py                   # all of it, about ten minutes on two cores
python benchmarks/overhead.py --quick           # fewer contenders and samples, under two minutes
python benchmarks/overhead.py --only tiny wan   # some cases
python benchmarks/overhead.py --out results.json
python benchmarks/overhead.py --only tiny --against ../before   # what a change costs: beside another checkout

See README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bounds import gpipe_bound_s
from measure import HERE, Contender, Process, free_port, interleave, middle, table
from models import Case
from wan import Lab, LabError, Matrix, check_permitted

P = 4
BEFORE = " (before)"
"""What follows the names of contenders that run another checkout's code."""
NETWORK = HERE / "geo7.json"


@dataclass(frozen=True)
class Plan:
    """A case and how often to run it."""

    case: Case
    warmup: int
    rounds: int
    steps: int
    quick_rounds: int


PLANS = {
    "heavy": Plan(Case("compute-heavy", "transformer", 8, (4, 128, 256), 8), 1, 5, 1, 2),
    "tiny": Plan(Case("tiny, 8 microbatches", "linear", 8, (4, 16), 8), 10, 15, 10, 5),
    "tiny32": Plan(Case("tiny, 32 microbatches", "linear", 8, (4, 16), 32), 5, 15, 4, 3),
    "device24": Plan(Case("emulated devices, F 24 ms", "sleep", P, (4, 128, 256), 8, 0.024, 0.048), 1, 5, 1, 2),
    "device6": Plan(Case("emulated devices, F 6 ms", "sleep", P, (4, 128, 256), 8, 0.006, 0.012), 1, 9, 2, 3),
    "wan": Plan(Case("wide area", "transformer", 14, (8, 128, 64), 12), 1, 2, 1, 1),
    "memory": Plan(Case("memory", "transformer", 16, (1, 64, 512), 4), 2, 1, 3, 1),
}
QUICK = ("heavy", "tiny", "device6")


# ------------------------------------------------------------------- contenders


def one_process() -> Contender:
    return Contender("one process", [Process("one")], 1)


def torch_ranks(
    schedule: str, size: int = P, host: str = "127.0.0.1", commands: Sequence[tuple[str, ...]] | None = None
) -> Contender:
    """Ranks of torch.distributed.pipelining, each with an equal share of the blocks."""
    store = f"{host}:{free_port()}"
    commands = commands or [()] * size
    settings = [{"rank": rank, "size": size, "store": store, "schedule": schedule} for rank in range(size)]
    processes = [Process("torch", *arguments) for arguments in zip(settings, commands, strict=True)]
    return Contender(f"torch {schedule}", processes, size)


def engine(
    schedule: str,
    driver_stage: bool,
    size: int = P,
    host: str = "127.0.0.1",
    commands: Sequence[tuple[str, ...]] | None = None,
    checkout: Path = HERE.parent,
) -> Contender:
    """A driver with blocks of its own and ``size - 1`` workers, or a driver without and ``size`` workers."""
    commands = commands or [()] * size
    workers = commands[1:] if driver_stage else commands
    settings = {"schedule": schedule, "driver_stage": driver_stage, "host": host, "workers": workers}
    name = engine_name(schedule, driver_stage, size) + _whose(checkout)
    return Contender(name, [Process("engine", settings, commands[0], checkout)], size)


def engine_name(schedule: str, driver_stage: bool, size: int = P) -> str:
    return f"ours {schedule}, driver + {size - driver_stage} workers"


def trainer(devices: int, optimizer: str = "sgd", checkout: Path = HERE.parent) -> Contender:
    settings = {"devices": devices, "schedule": "1f1b", "driver_stage": True, "optimizer": optimizer}
    name = "Trainer, one process" if devices == 1 else f"Trainer, ours 1f1b, driver + {devices - 1} workers"
    return Contender(name + _whose(checkout), [Process("trainer", settings, checkout=checkout)], devices)


def _whose(checkout: Path) -> str:
    return "" if checkout == HERE.parent else BEFORE


@contextmanager
def started(contenders: list[Contender]) -> Iterator[list[Contender]]:
    """Wait until all contenders are there; end them at last."""
    try:
        for contender in contenders:
            contender.await_start()
        yield contenders
    finally:
        for contender in contenders:
            contender.close()


# ------------------------------------------------------------------------ cases


def run_local(plans: dict[str, Plan], quick: bool) -> dict[str, Any]:
    """All cases on this machine's own cores, in one set of processes."""
    schedules = ("1f1b",) if quick else ("gpipe", "1f1b")
    contenders = [one_process(), *map(torch_ranks, schedules)]
    contenders += [engine(schedule, driver_stage) for driver_stage in (True, False) for schedule in schedules]
    contenders += [] if quick else [trainer(1), trainer(P)]
    results = {}
    with started(contenders):
        for key, plan in plans.items():
            rounds = plan.quick_rounds if quick else plan.rounds
            emulated = plan.case.block == "sleep"
            racing = [c for c in contenders if not (emulated and c.name.startswith("Trainer"))]
            results[key] = run_case(racing, plan, rounds)
            report(results[key])
    return results


def run_against(plans: dict[str, Plan], checkout: Path) -> dict[str, Any]:
    """This checkout and another one in turns, in one set of processes: what the change between them costs."""
    both = (HERE.parent, checkout)
    contenders = [engine(schedule, True, checkout=each) for schedule in ("gpipe", "1f1b") for each in both]
    contenders += [trainer(P, checkout=each) for each in both]
    results = {}
    with started(contenders):
        for key, plan in plans.items():
            racing = [c for c in contenders if not (plan.case.block == "sleep" and c.name.startswith("Trainer"))]
            results[key] = run_case(racing, plan, 3 * plan.rounds)
            report_against(results[key])
    return results


def run_case(contenders: list[Contender], plan: Plan, rounds: int, **options: Any) -> dict[str, Any]:
    load = os.getloadavg()
    for contender in contenders:
        contender.build(plan.case, plan.warmup)
    samples = interleave(contenders, rounds, plan.steps, **options)
    norms = {c.name: c.norm() for c in contenders if not c.name.startswith("Trainer")}
    check_equal("losses", {name: runs[-1]["loss"] for name, runs in samples.items()})
    check_equal("gradient norms", norms)
    sizes = {contender.name: contender.num_processes for contender in contenders}
    return {"case": asdict(plan.case), "load": load, "samples": samples, "norms": norms, "num_processes": sizes}


def check_equal(what: str, values: dict[str, float]) -> None:
    """Nobody may be faster by computing something else."""
    middle_value = median(values.values())
    for name, value in values.items():
        if abs(value - middle_value) > 1e-4 * abs(middle_value):
            raise RuntimeError(f"{what} differ: {name} has {value}, but the median of all is {middle_value}")


def run_wan(plan: Plan, quick: bool) -> dict[str, Any] | None:
    """Seven cities: ranks in network namespaces with the latency and bandwidth of each pair."""
    matrix = Matrix.load(NETWORK)
    try:
        check_permitted()
    except LabError as error:
        print(f"\nwide area: skipped, {error}")
        return None
    schedules = ("gpipe",) if quick else ("gpipe", "1f1b")
    with Lab("skippipe-bench", matrix) as lab:
        commands, host = [lab.command(node) for node in range(matrix.num_nodes)], lab.address(0)
        places = {"size": matrix.num_nodes, "host": host, "commands": commands}
        contenders = [one_process(), *(torch_ranks(schedule, **places) for schedule in schedules)]
        contenders += [engine(schedule, True, **places) for schedule in schedules]
        with started(contenders):
            result = run_case(contenders, plan, plan.quick_rounds if quick else plan.rounds)
        result["router"] = lab.stats()
    report(result)
    late = result["router"]["late_ms"], result["router"]["latest_ms"]
    print(f"\nThe router delivered {late[0]:.2f} ms late on average, {late[1]:.1f} ms at worst.", flush=True)
    return result


def run_memory(plan: Plan) -> dict[str, Any]:
    """Peak memory of each process, from its start and over the last steps, against one process."""
    results: dict[str, Any] = {"case": asdict(plan.case), "peak_mb": {}}
    for devices in (1, P):
        with started([trainer(devices, optimizer="adamw")]) as (contender,):
            contender.build(plan.case, plan.warmup)
            (start,) = contender.ask(memory="peak")
            contender.ask(memory="forget")
            contender.sample(plan.steps)
            (steps,) = contender.ask(memory="peak")
        results["peak_mb"][contender.name] = {"with start": start["peak_mb"], "steps": steps["peak_mb"]}
    report_memory(results)
    return results


# ---------------------------------------------------------------------- reports


def report(result: dict[str, Any]) -> None:
    case = Case.of(result["case"])
    samples = result["samples"]
    single = samples.get("one process")
    single_s = middle(single, "wall_s") if single else None
    rows = []
    for name, runs in samples.items():
        wall_s, cpu_s = middle(runs, "wall_s"), middle(runs, "cpu_s")
        size = result["num_processes"][name]
        limit_s = ideal_s(case, size, single_s)
        reference = reference_s(samples, name)
        actions = 2 * case.num_microbatches * size
        rows.append(
            [
                name,
                f"{wall_s * 1e3:.1f}",
                f"{min(run['wall_s'] for run in runs) * 1e3:.1f}",
                ratio(wall_s, single_s),
                ratio(wall_s, reference),
                f"{limit_s * 1e3:.0f}" if limit_s else "",
                ratio(wall_s, limit_s),
                f"{cpu_s * 1e3:.1f}",
                f"{cpu_s / actions * 1e6:.0f}" if size > 1 else "",
            ]
        )
    load = ", ".join(f"{value:.1f}" for value in result["load"])
    print(f"\n{case.name}: {case.num_blocks} blocks, {case.num_microbatches} microbatches of {case.microbatch}")
    print(f"{len(next(iter(samples.values())))} samples each, load average {load} at the start\n")
    header = ["", "ms", "least", "/ one", "/ torch", "bound ms", "/ bound", "CPU ms", "CPU us/action"]
    print(table(header, rows), flush=True)


def report_against(result: dict[str, Any]) -> None:
    """Medians of both, the ratio of the medians, and the median of the ratios of each round's pair."""
    samples, rows = result["samples"], []
    for name, after in samples.items():
        if name.endswith(BEFORE):
            continue
        before = samples[name + BEFORE]
        pairs = [new["wall_s"] / old["wall_s"] for new, old in zip(after, before, strict=True)]
        after_s, before_s = middle(after, "wall_s"), middle(before, "wall_s")
        cpu = middle(after, "cpu_s") / middle(before, "cpu_s")
        numbers = [f"{before_s * 1e3:.2f}", f"{after_s * 1e3:.2f}", f"{after_s / before_s:.3f}", f"{median(pairs):.3f}"]
        rows.append([name, *numbers, f"{cpu:.3f}"])
    load = ", ".join(f"{value:.1f}" for value in result["load"])
    print(f"\n{Case.of(result['case']).name}: {len(after)} samples each, load average {load} at the start\n")
    print(table(["", "before ms", "after ms", "ratio", "by pairs", "CPU ratio"], rows), flush=True)


def ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.2f}" if reference else ""


def reference_s(samples: dict[str, list[Any]], name: str) -> float | None:
    """The time of torch's run of the same schedule."""
    if not name.startswith(("ours", "Trainer, ours")):
        return None
    schedule = "gpipe" if "gpipe" in name else "1f1b"
    runs = samples.get(f"torch {schedule}")
    return middle(runs, "wall_s") if runs else None


def ideal_s(case: Case, size: int, single_s: float | None) -> float | None:
    """What devices and links alone allow, where they are emulated."""
    if case.block == "sleep":
        rounds = case.num_microbatches * case.num_blocks if size == 1 else case.num_microbatches + size - 1
        return rounds * (case.forward_s + case.backward_s)
    if case == PLANS["wan"].case and size > 1 and single_s:
        both_s = single_s / case.num_microbatches / size
        return gpipe_bound_s(case, Matrix.load(NETWORK), both_s / 3, both_s * 2 / 3)
    return None


def report_memory(result: dict[str, Any]) -> None:
    rows = []
    for name, peaks in result["peak_mb"].items():
        for index, (start, steps) in enumerate(zip(peaks["with start"], peaks["steps"], strict=True)):
            role = "" if len(peaks["steps"]) == 1 else (", driver" if index == 0 else f", worker {index}")
            rows.append([name + role, f"{start:.0f}", f"{steps:.0f}"])
    case = Case.of(result["case"])
    weights = case.num_blocks * 12 * case.microbatch[-1] ** 2 * 4 / 1e6
    print(f"\nmemory: {weights:.0f} MB of block weights, AdamW; peak resident MB of each process\n")
    print(table(["", "with start", "steps after"], rows), flush=True)


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all samples as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer contenders, cases and samples")
    parser.add_argument("--only", nargs="+", choices=PLANS, metavar="CASE", help=f"some of {', '.join(PLANS)}")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="race another checkout's code instead of torch's"
    )
    parser.add_argument(
        "--steps", type=int, help="how many steps a sample has; the first finds other code in the caches"
    )
    arguments = parser.parse_args()
    chosen = arguments.only or (QUICK if arguments.quick else tuple(PLANS))
    results: dict[str, Any] = {"environment": environment(), "arguments": sys.argv[1:]}
    print(json.dumps(results["environment"]), flush=True)
    local = {key: PLANS[key] for key in chosen if key not in ("wan", "memory")}
    if arguments.steps:
        local = {key: dataclasses.replace(plan, steps=arguments.steps) for key, plan in local.items()}
    if arguments.against:
        results |= run_against(local, arguments.against.resolve())
    elif local:
        results |= run_local(local, arguments.quick)
    if "wan" in chosen and not arguments.against:
        results["wan"] = run_wan(PLANS["wan"], arguments.quick)
    if "memory" in chosen and not arguments.against:
        results["memory"] = run_memory(PLANS["memory"])
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
