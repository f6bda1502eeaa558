"""What skipping does to learning: one small language model, the same text, several ways to train it.

python benchmarks/convergence.py --quick                 # under two minutes, a smoke test
python benchmarks/convergence.py --out convergence.json  # everything, with --plot PICTURE.png
python benchmarks/convergence.py --jobs 2 --seeds 0 1    # two trainings at a time, which is the default

A byte-level model of 12 blocks learns Python's language reference, and is judged on its held-out last tenth with every
block in place. All runs of a seed start from the same weights; all but the shorter ones see the same batches. Every
learning rate warms up and decays to zero within its own run, so no run ends in the middle of its schedule. Its
height is the best for exact training of 0.0015, 0.003 and 0.006 (120 steps).

Paths and seconds per step come from the planner, for a driver and 12 stages of one block on the nodes of
`cases/five_cities.json` (costs of the SkipPipe paper's experiment, arXiv 2502.19913), each plan with the placement
that is best for it. "exact, time of ..." are exact runs with as many tokens as fit into the simulated time of that run.

Training itself runs in one process per run, which follows the same paths (`emulation.py`). Before that, each plan runs
for a few steps in the real pipeline of 13 processes; losses must agree, and its "measured" seconds per step come from
there: blocks that take a tenth of the case's time on emulated devices, links of this host. "own paths" is the
validation loss on the paths of training, in place of all blocks.

Runs that --out already holds, with the same settings, are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from statistics import mean, median
from typing import Any

import torch
from convergence_plot import draw
from emulation import ByteDataset, ByteLM, EmulatedLM, Paths, default_text, on_devices
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader

from skippipe_plugin.schedule import PathConstraints, Plan, plan
from skippipe_plugin.schedule.casefile import read_case

CASE = FilePath(__file__).parent / "cases/five_cities.json"
SIZE = {"width": 64, "num_layers": 12, "context": 64, "lr": 6e-3}
BATCH, MICROBATCHES = 24, 12
TOKENS_PER_STEP = BATCH * SIZE["context"]
POINTS = 6
"""Validations in a run, the last one after its end."""
CHECKED_STEPS = 5
DEVICE_SPEEDUP = 10
"""How many times faster the emulated devices are than the case's."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A plan of the case and how long its step takes."""

    paths: Paths
    simulated_s: float
    bound_s: float
    measured_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    name: str
    plan: str
    """The name of the plan whose paths it follows."""
    seed: int
    steps: int
    exact_from: int
    """The step from which nothing is skipped."""
    gradient_scale: str
    paths: Paths
    lr: float

    @property
    def key(self) -> str:
        """What a finished run is recognised by."""
        return json.dumps(asdict(self))


PLANS = {"exact": (0.0, 0), "skip 0.25": (0.25, None), "skip 0.33, no swaps": (0.33, 0), "skip 0.33": (0.33, None)}
"""Skip ratio and most swaps of a path; None is the paper's 2."""


def make_plan(name: str, budget_s: float) -> Plan:
    ratio, max_swaps = PLANS[name]
    problem = read_case(CASE, placement_mode="plan")
    return plan(replace(problem, constraints=PathConstraints(skip_ratio=ratio, max_swaps=max_swaps)), budget_s=budget_s)


# Training -----------------------------------------------------------------------------------------


class History(Callback):
    """Notes step and validation loss."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val_loss"])))


class Losses(Callback):
    """Notes the loss and the end of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.ends_s: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))
        self.ends_s.append(time.perf_counter())


def loaders(seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return training and validation data; the order of the batches depends on the seed alone."""
    text, context = default_text(), SIZE["context"]
    split = len(text) * 9 // 10
    generator = torch.Generator().manual_seed(seed)
    training = ByteDataset(text[:split], context)
    order = DataLoader(training, BATCH, shuffle=True, drop_last=True, generator=generator)
    return order, DataLoader(ByteDataset(text[split:], context), 91, drop_last=True)


def fit(model: ByteLM, seed: int, steps: int, callback: Callback, val: bool, **options: Any) -> Trainer:
    checked = {"val_check_interval": math.ceil(steps / POINTS), "check_val_every_n_epoch": None} if val else {}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if val else 0,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **checked,
        **options,
    )
    trainer.fit(model, *loaders(seed))
    return trainer


def train(run: Run) -> dict[str, Any]:
    """Train one run in this process; return its curve and its last validation loss."""
    _quiet()
    seed_everything(run.seed, verbose=False)
    model = EmulatedLM(run.paths, run.exact_from, run.gradient_scale, **SIZE | {"lr": run.lr})
    history = History()
    started_s = time.perf_counter()
    trainer = fit(model, run.seed, run.steps, history, val=True, devices=1)
    seconds = time.perf_counter() - started_s
    assert trainer.global_step == run.steps
    (metrics,) = trainer.validate(model, loaders(run.seed)[1], verbose=False)
    return {
        "points": sorted(dict(history.points).items()),
        "val_loss": metrics["val_loss"],
        "own_paths_loss": loss_on_own_paths(model) if run.paths else metrics["val_loss"],
        "process_s": seconds,
    }


@torch.no_grad()
def loss_on_own_paths(model: EmulatedLM) -> float:
    """Return the validation loss on the paths of training instead of on all blocks."""
    losses = []
    for batch in DataLoader(loaders(0)[1].dataset, 6 * MICROBATCHES, drop_last=True):
        logits = model.eval().on_paths(batch[:, :-1])
        losses.append(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
    return mean(losses)


def train_all(runs: Sequence[Run], done: dict[str, Any], jobs: int) -> Iterable[tuple[Run, dict[str, Any]]]:
    """Yield the result of each run as it ends; finished ones first."""
    yield from ((run, done[run.key]) for run in runs if run.key in done)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(train, run): run for run in runs if run.key not in done}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|log_every_n_steps|LeafSpec).*")


# The real pipeline ---------------------------------------------------------------------------------


def check_in_pipeline(name: str, found: Plan, gradient_scale: str) -> float:
    """Run a plan in the real pipeline, compare losses with the emulation, and return its seconds per step."""
    from skippipe_plugin.strategies import SkipPipeStrategy

    problem = read_case(CASE)
    forward_s = problem.cost.compute.rank_factor[0] / DEVICE_SPEEDUP
    backward_s = forward_s * problem.cost.compute.backward_s[1]
    losses = []
    for emulated in (True, False):
        seed_everything(0, verbose=False)
        callback = Losses()
        if emulated:
            model: ByteLM = EmulatedLM(paths_of(found), gradient_scale=gradient_scale, **SIZE)
            fit(model, 0, CHECKED_STEPS, callback, val=False, devices=1)
        else:
            model = on_devices(ByteLM(**SIZE), forward_s, backward_s)
            strategy = SkipPipeStrategy(schedule=found.schedule, gradient_scale=gradient_scale)
            fit(model, 0, CHECKED_STEPS, callback, val=False, devices=13, strategy=strategy)
        losses.append(callback.values)
    furthest = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    if furthest > 1e-5:
        raise SystemExit(f"{name}: losses of pipeline and emulation differ by {furthest:.1e}: {losses}")
    steps_s = [end - start for start, end in zip(callback.ends_s[1:], callback.ends_s[2:], strict=False)]
    print(
        f"  {name:<22} pipeline and emulation agree to {furthest:.0e} over {CHECKED_STEPS} steps "
        f"(gradient_scale={gradient_scale!r}), measured {median(steps_s):.2f} s per step",
        flush=True,
    )
    return median(steps_s)


def paths_of(found: Plan) -> Paths:
    return tuple(path.stages for path in found.schedule.paths)


# The study ----------------------------------------------------------------------------------------


def make_runs(timed: dict[str, Timed], steps: int, seeds: Sequence[int], lr: float, quick: bool) -> list[Run]:
    """List the runs, those that tell most first."""

    def run(name: str, plan: str, seed: int, **changes: Any) -> Run:
        defaults = {"steps": steps, "exact_from": steps, "gradient_scale": "batch"}
        paths = timed[plan].paths if plan != "exact" else ()
        return Run(name=name, plan=plan, seed=seed, paths=paths, lr=lr, **{**defaults, **changes})

    def same_time(plan: str) -> int:
        return round(steps * timed[plan].simulated_s / timed["exact"].simulated_s)

    runs = []
    for seed in seeds:
        runs += [run("exact", "exact", seed), run("skip 0.33", "skip 0.33", seed)]
        runs += [run("exact, time of skip 0.33", "exact", seed, steps=same_time("skip 0.33"))]
        if not quick:
            runs += [
                run("skip 0.25", "skip 0.25", seed),
                run("exact, time of skip 0.25", "exact", seed, steps=same_time("skip 0.25")),
                run("skip 0.33, no swaps", "skip 0.33, no swaps", seed),
                run("skip 0.33, scale 'visit'", "skip 0.33", seed, gradient_scale="visit"),
                run("skip 0.33, exact last 1/4", "skip 0.33", seed, exact_from=steps * 3 // 4),
            ]
    return runs


def seconds(run: Run, timed: dict[str, Timed], kind: str, steps: int | None = None) -> float:
    """Return how long the first ``steps`` steps of a run take, simulated or measured."""
    steps = run.steps if steps is None else steps
    skipping = min(steps, run.exact_from)
    return skipping * getattr(timed[run.plan], kind) + (steps - skipping) * getattr(timed["exact"], kind)


def table(results: Sequence[tuple[Run, dict[str, Any]]], timed: dict[str, Timed]) -> str:
    """One line per kind of run: means over the seeds, and each seed's loss."""
    lines = [
        f"{'run':<26} {'tokens':>8} {'val loss':>9} {'own paths':>9} {'perplexity':>10} "
        f"{'simulated':>14} {'measured':>12}  val loss of each seed",
        f"{'':<26} {'':>8} {'nats/byte':>9} {'nats/byte':>9} {'to exact':>10} "
        f"{'min':>7} {'ratio':>6} {'s':>6} {'ratio':>5}",
    ]
    base = next(run for run, _ in results if run.name == "exact")
    exact = mean(result["val_loss"] for run, result in results if run.name == "exact")
    for name in dict.fromkeys(run.name for run, _ in results):
        run = next(run for run, _ in results if run.name == name)
        losses = [result["val_loss"] for other, result in results if other.name == name]
        own = [result["own_paths_loss"] for other, result in results if other.name == name]
        simulated, measured = (seconds(run, timed, f"{kind}_s") for kind in ("simulated", "measured"))
        lines.append(
            f"{name:<26} {run.steps * TOKENS_PER_STEP:>8} {mean(losses):>9.4f} {mean(own):>9.4f} "
            f"{math.exp(mean(losses) - exact) - 1:>+10.1%} "
            f"{simulated / 60:>7.0f} {simulated / seconds(base, timed, 'simulated_s'):>6.2f} "
            f"{measured:>6.0f} {measured / seconds(base, timed, 'measured_s'):>5.2f}  "
            + " ".join(f"{loss:.4f}" for loss in losses)
        )
    return "\n".join(lines)


def curves(results: Sequence[tuple[Run, dict[str, Any]]], timed: dict[str, Timed]) -> dict[str, list[dict[str, float]]]:
    """By name of run: tokens, simulated and measured seconds, and the loss, averaged over the seeds."""
    found: dict[str, list[dict[str, float]]] = {}
    for name in dict.fromkeys(run.name for run, _ in results):
        same = [(run, result["points"]) for run, result in results if run.name == name]
        run = same[0][0]
        found[name] = [
            {
                "tokens": step * TOKENS_PER_STEP,
                "simulated_s": seconds(run, timed, "simulated_s", step),
                "measured_s": seconds(run, timed, "measured_s", step),
                "loss": mean(points[index][1] for _, points in same),
            }
            for index, (step, _) in enumerate(same[0][1])
        ]
    return found


def time_plans(names: Iterable[str], budget_s: float) -> dict[str, Timed]:
    """Plan, check in the pipeline, and measure."""
    timed = {}
    print("plans for a driver and 12 stages in five cities; each is checked in the real pipeline:", flush=True)
    for name in names:
        found = make_plan(name, budget_s)
        measured_s = check_in_pipeline(name, found, "visit" if name == "skip 0.33" else "batch")
        timed[name] = Timed(paths_of(found), found.makespan_s, found.lower_bound_s, measured_s)
        print(
            f"  {'':<22} simulated {found.makespan_s:.2f} s per step, lower bound {found.lower_bound_s:.2f} s",
            flush=True,
        )
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, one seed, fewer kinds of runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lr", type=float, default=SIZE["lr"])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--out", type=FilePath, help="the results as JSON; finished runs in it are taken over")
    parser.add_argument("--plot", type=FilePath, help="the curves, .png or .svg")
    options = parser.parse_args()
    _quiet()
    if options.quick:
        options.steps, options.seeds = 48, [0]
    before = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    budget_s = 1.0 if options.quick else 5.0
    names = ("exact", "skip 0.33") if options.quick else PLANS
    timed = {name: Timed(**entry) for name, entry in before.get("plans", {}).items()}
    timed = {name: replace(t, paths=tuple(map(tuple, t.paths))) for name, t in timed.items()}
    if set(timed) != set(names):
        timed = time_plans(names, budget_s)
    runs = make_runs(timed, options.steps, options.seeds, options.lr, options.quick)
    done: dict[str, Any] = before.get("runs", {})
    for run, result in train_all(runs, done, options.jobs):
        done[run.key] = result
        print(f"  {run.name:<26} seed {run.seed}: {result['val_loss']:.4f} ({result['process_s']:.0f} s)", flush=True)
        if options.out:
            plans = {name: asdict(entry) for name, entry in timed.items()}
            options.out.write_text(json.dumps({"plans": plans, "cores": os.cpu_count(), "runs": done}))
    results = [(run, done[run.key]) for run in runs]
    print(f"\n{table(results, timed)}")
    if options.plot:
        draw(curves(results, timed), options.plot)


if __name__ == "__main__":
    main()
