"""Partial pipelines on an emulated wide-area network: torch, our exact schedules, random and planned skipping.

python benchmarks/partial_wan.py                    # seven cities, about seven minutes; needs root
python benchmarks/partial_wan.py --quick            # about three minutes
python benchmarks/partial_wan.py --out results.json

One run, in turns: every row trains the same blocks on the same batch with seven processes, one in each city. Beside
each measured step stands what the simulator predicted from costs that were measured before: links by pings, compute
in one exact step. See README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bounds import gpipe_bound_s
from measure import Contender, Process, free_port, middle, table
from models import Case
from overhead import NETWORK, check_equal, environment, torch_ranks
from partial_plans import Entry, at_random, exact, planned
from wan import Lab, LabError, Matrix, check_permitted

from skippipe_plugin.schedule import CostModel

CASE = Case("wide area, partial", "transformer", 14, (8, 128, 64), 12)
BASELINE = "torch 1f1b"


@dataclass(frozen=True)
class Row:
    """One way to train, in each round with an entry of its own for those that draw at random."""

    name: str
    contender: Contender
    entry: Callable[[int], Entry | None] = lambda number: None
    is_exact: bool = True


@contextmanager
def engine_on(lab: Lab, nodes: Sequence[int]) -> Iterator[Contender]:
    """A pipeline whose rank r runs on ``nodes[r]``."""
    settings = {"host": lab.address(nodes[0]), "workers": [lab.command(node) for node in nodes[1:]]}
    with_driver = Process("schedules", settings, lab.command(nodes[0]))
    with running(Contender("ours", [with_driver], len(nodes))) as contender:
        contender.build(CASE, 1)
        yield contender


@contextmanager
def running(contender: Contender) -> Iterator[Contender]:
    """Wait for a contender's processes; end them at last, at once if something went wrong."""
    try:
        contender.await_start()
        yield contender
    except BaseException:
        contender.close(patience_s=2)
        raise
    contender.close()


def sample(row: Row, number: int) -> dict[str, Any]:
    """Run one step of a row, with the schedule it has in that round."""
    entry = row.entry(number)
    if entry is not None:
        row.contender.ask(schedule=entry.schedule.to_json())
    result = row.contender.sample(1)
    if entry is not None:
        result |= {"predicted_s": entry.predicted_s, "bound_s": entry.bound_s}
    return result


def measure_rows(rows: Sequence[Row], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Let the rows take turns, in another order each round."""
    samples: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    order = random.Random(0)
    for number in range(rounds):
        for row in order.sample(rows, len(rows)):
            samples[row.name].append(sample(row, number))
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start everybody, measure the costs, plan, and race."""
    matrix, case = Matrix.load(arguments.network), CASE
    ratio, places = arguments.skip_ratio, range(matrix.num_nodes)
    with Lab("skippipe-partial", matrix) as lab, ExitStack() as stack:
        enter = stack.enter_context
        commands = [lab.command(node) for node in places]
        options = {"size": matrix.num_nodes, "host": lab.address(0), "commands": commands}
        torches = [enter(running(torch_ranks(schedule, **options))) for schedule in ("1f1b", "gpipe")]
        for contender in torches:
            contender.build(case, 1)
        ours = enter(engine_on(lab, places))
        cost = CostModel.from_json(ours.ask(measure=True)[0]["cost"])
        print_costs(cost, matrix)
        rows = [Row(contender.name, contender) for contender in torches]
        rows += fixed_rows(ours, cost, ratio)
        if not arguments.quick:
            placed = planned(cost, case.num_microbatches, ratio, place=True)
            contender = enter(engine_on(lab, placed.nodes))
            rows.append(Row("ours planned, placement too", contender, lambda _: placed, is_exact=False))
            rows.append(Row("Trainer, ours planned", enter(trainer_on(lab, ratio)), is_exact=False))
        samples = measure_rows(rows, arguments.rounds)
        router = lab.stats()
    check_equal("losses", {row.name: samples[row.name][-1]["loss"] for row in rows if row.is_exact})
    return {"cost": json.loads(cost.to_json()), "samples": samples, "router": router, "skip_ratio": ratio}


def fixed_rows(ours: Contender, cost: CostModel, ratio: float) -> list[Row]:
    """Our schedules where stage s is on node s: exact ones, partial paths at random, planned ones."""
    count = CASE.num_microbatches
    entries = {f"ours exact, {name}": exact(name, cost, count) for name in ("1f1b", "gpipe")}
    entries["ours exact, planned order"] = planned(cost, count, 0.0)
    rows = [Row(name, ours, functools.partial(_always, entry)) for name, entry in entries.items()]
    skipping = planned(cost, count, ratio)
    rows.append(Row("ours random paths", ours, lambda number: at_random(cost, count, ratio, number), is_exact=False))
    rows.append(Row("ours planned paths", ours, lambda _: skipping, is_exact=False))
    return rows


def _always(entry: Entry, number: int) -> Entry:
    return entry


def trainer_on(lab: Lab, ratio: float) -> AbstractContextManager[Contender]:
    """A whole Trainer with SkipPipeStrategy, launched as torchrun would; it measures and plans by itself."""
    nodes = range(lab.matrix.num_nodes)
    settings = {
        "devices": len(nodes),
        "schedule": "1f1b",
        "driver_stage": False,
        "skip_ratio": ratio,
        "master": [lab.address(0), free_port()],
        "ranks": [lab.command(node) for node in nodes[1:]],
    }
    return _built(Contender("Trainer, ours planned", [Process("trainer", settings, lab.command(0))], len(nodes)))


@contextmanager
def _built(contender: Contender) -> Iterator[Contender]:
    with running(contender):
        contender.build(CASE, 3)  # warm up, measure, plan
        yield contender


# ---------------------------------------------------------------------- reports


def report(result: dict[str, Any], matrix: Matrix) -> None:
    """Print the table: measured, predicted, bound."""
    samples = result["samples"]
    baseline_s = middle(samples[BASELINE], "wall_s")
    share_s = [sum(result["cost"][key][1:]) / matrix.num_nodes for key in ("forward_s", "backward_s")]
    gpipe_s = gpipe_bound_s(CASE, matrix, *share_s)
    rows = []
    for name, runs in samples.items():
        wall_s = middle(runs, "wall_s")
        predicted_s = middle(runs, "predicted_s") if "predicted_s" in runs[0] else None
        bound_s = middle(runs, "bound_s") if predicted_s else None
        if name == "torch gpipe":
            bound_s = gpipe_s
        rows.append(
            [
                name,
                f"{wall_s:.2f}",
                f"{min(run['wall_s'] for run in runs):.2f}",
                f"{wall_s / baseline_s:.2f}",
                f"{predicted_s:.2f}" if predicted_s else "",
                f"{wall_s / predicted_s:.2f}" if predicted_s else "",
                f"{bound_s:.2f}" if bound_s else "",
                f"{middle(runs, 'cpu_s'):.2f}",
            ]
        )
    count = len(samples[BASELINE])
    print(f"\n{CASE.num_blocks} blocks, {CASE.num_microbatches} microbatches, {CASE.message_bytes} bytes a message,")
    print(f"{matrix.num_nodes} cities, skip ratio {result['skip_ratio']:.3g}; medians of {count} samples\n")
    header = ["", "s", "least", "/ torch 1f1b", "predicted s", "/ predicted", "bound s", "CPU s"]
    print(table(header, rows))
    late = result["router"]["late_ms"], result["router"]["latest_ms"]
    print(f"\nThe router delivered {late[0]:.2f} ms late on average, {late[1]:.1f} ms at worst.", flush=True)


def print_costs(cost: CostModel, matrix: Matrix) -> None:
    """Print how far the pings are from what is emulated, and the compute."""
    size = range(matrix.num_nodes)
    errors = sorted(
        cost.message_s(a, b) / matrix.message_s(a, b, CASE.message_bytes) - 1 for a in size for b in size if a < b
    )
    both = zip(cost.compute.forward_s[1:], cost.compute.backward_s[1:], strict=True)
    stages = ", ".join(f"{1e3 * (forward_s + backward_s):.1f}" for forward_s, backward_s in both)
    print(
        f"pinged: a message costs {errors[0]:+.1%} to {errors[-1]:+.1%} of what is emulated, over {len(errors)} links"
    )
    print(f"measured: forward and backward of stages 1 to {cost.num_stages} take {stages} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write costs and all samples as JSON")
    parser.add_argument("--quick", action="store_true", help="one sample of each row, without the last two rows")
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each row (3)")
    parser.add_argument("--skip-ratio", type=float, default=1 / 3, metavar="R", help="share of skipped stages (1/3)")
    parser.add_argument("--network", type=Path, default=NETWORK, metavar="FILE", help="the links (geo7.json)")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    try:
        check_permitted()
    except LabError as error:
        sys.exit(f"cannot emulate a network: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave every with statement, as Ctrl-C does
    found = environment()
    print(json.dumps(found), flush=True)
    try:
        result = run(arguments)
    except KeyboardInterrupt:
        sys.exit("interrupted; the network and its processes are gone")
    report(result, Matrix.load(arguments.network))
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": found, "arguments": sys.argv[1:], **result}, indent=1))


if __name__ == "__main__":
    main()
