"""What a lost worker costs: ours beside torchrun and checkpoints, and what it does to learning.

python benchmarks/recovery.py                     # everything, under eight minutes on two cores
python benchmarks/recovery.py --quick             # fewer kills and seeds, under three minutes
python benchmarks/recovery.py --only race after   # some parts: race, after, time
python benchmarks/recovery.py --out recovery.json
python benchmarks/recovery.py --only race --against ../before   # what a change costs: beside another checkout

race: processes of running trainings are killed; the seconds until they commit a step again, and the work done twice.
after: a stage of a model is lost, and the loss is compared after 50 further steps.
time: the time to a given loss, with failures and restarts on a simulated clock. See README.md for the details.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from measure import table
from recovery_race import EVERY, WAYS, RaceError, against, race
from recovery_run import BATCH
from recovery_study import (
    AFTER,
    BEFORE,
    ITERATION_S,
    MOST_STEPS,
    RATES,
    REDUNDANT_FACTOR,
    TARGET_STEP,
    WRITE_S,
    Journey,
    after_a_loss,
    best_interval,
    run_all,
    time_with_checkpoints,
    time_with_recovery,
    travel,
    undisturbed,
)

SPARE_LIMIT_S = 0.5
AROUND_LIMIT_S = 0.3
"""Beside one step that is repeated."""
PAPERS_GAIN = 0.12
PAUSES_S = {"ours, warm spare": 0.5, "torchrun and checkpoints": 10.0}
"""Seconds without a step that the simulated clock takes where the race was not run."""
PAPERS_INTERVAL = 100
"""Iterations between two checkpoints in CheckFree's own harness."""

Samples = dict[str, list[dict[str, float]]]


def race_table(samples: Samples) -> str:
    """Medians, spread, what is lost, and whether the limits hold."""
    peer = _middle(samples.get("torchrun and checkpoints") or next(iter(samples.values())), "regained_s")
    rows = []
    for name, kills in samples.items():
        step_s, pause_s = _middle(kills, "step_s"), _middle(kills, "next_commit_s")
        limits = {"ours, warm spare": SPARE_LIMIT_S, "ours, routing around": step_s + AROUND_LIMIT_S}
        limit_s = limits.get(name)
        pauses = sorted(kill["next_commit_s"] for kill in kills)
        rows.append(
            [
                name,
                str(len(kills)),
                f"{step_s:.3f}",
                f"{pause_s:.3f}",
                f"{pauses[0]:.2f}-{pauses[-1]:.2f}",
                "" if limit_s is None else f"{limit_s:.3f} {'holds' if pause_s <= limit_s else 'missed'}",
                f"{_middle(kills, 'regained_s'):.3f}",
                f"{_middle(kills, 'regained_s') / peer:.3f}",
                f"{mean(kill['steps_lost'] for kill in kills) * BATCH:.0f}",
            ]
        )
    header = ["way", "kills", "step s", "next commit s", "range", "limit", "next new step s", "/ peer", "samples lost"]
    return table(header, rows)


def _middle(kills: list[dict[str, float]], key: str) -> float:
    return median(kill[key] for kill in kills)


def after_table(runs: list[dict[str, float]]) -> str:
    """Mean held-out loss over the seeds, and how far it is from that without failure in the same seed."""
    rows = []
    for name in runs[0]:
        if not name.endswith("at once"):
            apart = [run[name] - run["no failure"] for run in runs]
            spread = f"{stdev(apart):.4f}" if len(apart) > 1 else ""
            at_once = [run[f"{name}, at once"] - run["no failure"] for run in runs if f"{name}, at once" in run]
            jump = f"{mean(at_once):+.3f}" if at_once else ""
            rows.append([name, f"{mean(run[name] for run in runs):.4f}", f"{mean(apart):+.4f}", spread, jump])
    return table(["what was done", "loss", "to no failure", "spread", "at once"], rows)


def time_rows(seeds: Sequence[int], jobs: int, pauses_s: dict[str, float]) -> list[dict[str, Any]]:
    """Hours to the target by failure rate and way; the mean of the seeds."""
    curves = list(run_all(undisturbed, [(seed,) for seed in seeds], jobs))
    targets = {seed: curve[-1] for seed, curve in zip(seeds, curves, strict=True)}
    rates = (0.0, *RATES)
    journeys = [Journey(seed, rate, ends) for ends in (False, True) for rate in rates for seed in seeds]
    journeys = [journey for journey in journeys if journey.rate or journey.swap_ends]
    arrivals = list(run_all(travel, [(journey, targets[journey.seed]) for journey in journeys], jobs))
    restart_s, spare_s = pauses_s["torchrun and checkpoints"], pauses_s["ours, warm spare"]
    rows = []
    for rate in rates:
        row: dict[str, Any] = {"rate": rate, "no failure": TARGET_STEP * ITERATION_S}
        for every, write_s in ((PAPERS_INTERVAL, 0.0), (best_interval(rate) if rate else TARGET_STEP, WRITE_S)):
            name = f"checkpoint every {every}" if not write_s else "checkpoint, best interval"
            row[name] = time_with_checkpoints(TARGET_STEP, rate, every, restart_s, write_s)
        row["redundant"] = TARGET_STEP * ITERATION_S * REDUNDANT_FACTOR
        for name in ("CheckFree", "CheckFree+"):
            found = [a for j, a in zip(journeys, arrivals, strict=True) if (j.rate, j.name) == (rate, name)]
            reached = all(arrival["steps"] is not None for arrival in found)
            seconds = [time_with_recovery(a["steps"], a["failures"], spare_s) for a in found] if reached else []
            row[name] = mean(seconds) if seconds else None if found else row["no failure"]
            row[f"{name} failures"] = sum(arrival["failures"] for arrival in found)
        rows.append(row)
    return rows


def time_table(rows: list[dict[str, Any]]) -> str:
    """Hours, and what CheckFree saves beside each kind of checkpointing."""
    ways = ["no failure", f"checkpoint every {PAPERS_INTERVAL}", "checkpoint, best interval", "redundant"]
    ways += ["CheckFree", "CheckFree+"]
    lines = []
    for row in rows:
        hours = ["not reached" if row[way] is None else f"{row[way] / 3600:.2f}" for way in ways]
        better = min((row[way] for way in ("CheckFree", "CheckFree+") if row[way] is not None), default=None)
        gains = ["" if better is None else f"{1 - better / row[way]:+.0%}" for way in ways[1:3]]
        lines.append([f"{row['rate']:.0%}", *hours, *gains])
    return table(["failures/h", *ways, f"gain over every {PAPERS_INTERVAL}", "over best"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=("race", "after", "time"), default=["race", "after", "time"])
    parser.add_argument("--kills", type=int, help="of each way; 7, or 2 with --quick")
    parser.add_argument(
        "--seeds", type=int, help="of the trainings; 4 after a loss and 2 for the time to one, or 1 with --quick"
    )
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--out", type=Path, help="the results as JSON")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="race another checkout's code as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_seeds = [options.seeds or (1 if options.quick else default) for default in (4, 2)]
    results: dict[str, Any] = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if "race" in options.only:
        ways = against(options.against.resolve()) if options.against else WAYS
        results["race"] = race(options.kills or (2 if options.quick else 7), ways)
        print(f"\nA process is killed in the middle of a step; checkpoints every {EVERY} steps\n")
        print(race_table(results["race"]), flush=True)
    if "after" in options.only:
        results["after"] = list(run_all(after_a_loss, [(seed,) for seed in range(num_seeds[0])], options.jobs))
        print(f"\nHeld-out loss, nats per byte; a stage of six is lost after {BEFORE} steps, {AFTER} steps follow\n")
        print(after_table(results["after"]), flush=True)
    if "time" in options.only:
        pauses_s = PAUSES_S | {
            name: _middle(kills, "next_commit_s") for name, kills in results.get("race", {}).items() if name in PAUSES_S
        }
        results["time"] = time_rows(range(num_seeds[1]), options.jobs, pauses_s)
        print(f"\nHours to the loss of {TARGET_STEP} undisturbed iterations of {ITERATION_S:g} s, at most {MOST_STEPS}")
        print(f"goal: {PAPERS_GAIN:.0%} less than with checkpoints\n")
        print(time_table(results["time"]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    try:
        main()
    except RaceError as error:
        raise SystemExit(str(error)) from None
