"""The command line: ``skippipe plan | simulate | schedule show``.

Bad input ends with one line on standard error and exit status 2. No command here starts a process or imports torch.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import get_args

from skippipe_plugin.schedule.casefile import load_schedule, read_case, read_json, read_plan, save_plan
from skippipe_plugin.schedule.cost import CostModel, Links
from skippipe_plugin.schedule.ir import Schedule
from skippipe_plugin.schedule.partial import plan
from skippipe_plugin.schedule.problem import reordered
from skippipe_plugin.schedule.simulate import lower_bound_s, simulate
from skippipe_plugin.schedule.validate import peak_activations, validate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options), flush=True)
    except BrokenPipeError:  # such as: skippipe schedule show FILE | head
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - stays open till the end
    except OSError as error:
        print(f"skippipe: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"skippipe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skippipe", description="Plan and inspect pipelines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    planner = commands.add_parser("plan", help="plan paths, orders and perhaps the placement of a case")
    planner.add_argument("case", help="the case, JSON")
    planner.add_argument("--out", required=True, help="the plan file to write")
    planner.add_argument("--budget", type=float, default=10.0, metavar="S", help="seconds of search at most (10)")
    planner.add_argument("--seed", type=int, default=0, help="equal seeds give equal plans (0)")
    planner.add_argument("--placement", choices=("given", "plan"), default="given", help="who places stages on nodes")
    _add_links(planner)
    planner.set_defaults(run=_plan)
    simulator = commands.add_parser("simulate", help="time a plan of a case, or a schedule on a cost model")
    simulator.add_argument("case", help="the case, or the schedule")
    simulator.add_argument("plan", help="the plan of the case, or the cost model of the schedule")
    _add_links(simulator)
    simulator.set_defaults(run=_simulate)
    schedule = commands.add_parser("schedule", help="inspect schedules").add_subparsers(required=True, metavar="ACTION")
    show = schedule.add_parser("show", help="print a schedule, or the schedule of a plan, as text")
    show.add_argument("file")
    show.set_defaults(run=_show)
    return parser


def _add_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--links",
        choices=get_args(Links),
        default="free",
        help="queued: bytes of messages wait for each other on a directed link; shared: messages do (free)",
    )


def _plan(options: argparse.Namespace) -> str:
    problem = read_case(options.case, placement_mode=options.placement, links=options.links)
    if not FilePath(options.out).absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no such folder")
    started_s = time.monotonic()
    result = plan(problem, budget_s=options.budget, seed=options.seed)
    save_plan(result, options.out)
    idle = sorted(result.idle_share[: sum(map(bool, result.schedule.orders))])
    return (
        f"makespan {result.makespan_s:.3f} s, lower bound {result.lower_bound_s:.3f} s (gap {result.gap:.1%}), "
        f"idle {idle[0]:.0%} to {idle[-1]:.0%}, planned in {time.monotonic() - started_s:.1f} s"
    )


def _simulate(options: argparse.Namespace) -> str:
    first = FilePath(options.case).read_text(encoding="utf-8").lstrip()
    if first.startswith("schedule ") or {"format", "schedule"} & read_json(options.case).keys():
        schedule = load_schedule(options.case)
        cost = CostModel.load(options.plan)
        _check_world(schedule, cost, options.case)
        validate(schedule)
    else:
        problem = read_case(options.case, links=options.links)
        schedule, nodes = read_plan(options.plan, problem)
        cost, caps = reordered(problem.cost, nodes), problem.memory_caps
        validate(schedule, memory_caps=None if caps is None else [caps[node] for node in nodes])
    timeline = simulate(schedule, cost, links=options.links)
    peaks = peak_activations(schedule)
    return (
        f"makespan {timeline.makespan_s:.3f} s, no order of these paths is below "
        f"{lower_bound_s(schedule, cost):.3f} s, at most {max(peaks)} activations on a rank\n{timeline.table()}"
    )


def _check_world(schedule: Schedule, cost: CostModel, name: str) -> None:
    if schedule.num_ranks != cost.num_ranks:
        raise ValueError(
            f"{name} is for {schedule.num_ranks} ranks, the cost model for {cost.num_ranks}; plan for this world size"
        )


def _show(options: argparse.Namespace) -> str:
    return str(load_schedule(options.file))


if __name__ == "__main__":
    sys.exit(main())
